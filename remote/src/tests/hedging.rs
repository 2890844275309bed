//! What is late is asked for a second time, over a line of which one path is gone.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use snapstore_tests::object_server;
use snapstore_tests::proxy::{Line, Proxy};

use super::moody::{memory, options, page, with_base};
use super::{Outcome, PAGE, Scene};
use crate::Place;

/// From one page that is read to the next: each is a request of its own.
const STRIDE: usize = 40;

/// The same bucket, as a server has it, behind a proxy.
fn behind_proxy(scene: &mut Scene) -> Result<Proxy, Box<dyn std::error::Error>> {
    let server = object_server::serve(scene.dir.path())?;
    let proxy = Proxy::start(server, Line::default())?;
    let credentials = scene.dir.path().join("credentials");
    fs::write(
        &credentials,
        "AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=b\n",
    )?;
    fs::set_permissions(&credentials, fs::Permissions::from_mode(0o600))?;
    scene.place = Place {
        url: "s3://snaps/bucket".to_owned(),
        endpoint: Some(format!("http://{}", proxy.address())),
        region: Some("here".to_owned()),
        allow_http: true,
        credentials: Some(credentials),
        machine_role: false,
        key: scene.place.key.clone(),
        retry_seconds: Some(10),
    };
    Ok(proxy)
}

#[test]
fn what_is_late_is_asked_for_once_more_and_the_first_answer_counts() -> Outcome {
    for mut scene in [Scene::new()?, Scene::sealed()?] {
        let (store, bytes) = with_base(&scene, &[1; 6000])?;
        let proxy = behind_proxy(&mut scene)?;
        let lazy = scene.remote()?.lazy(&store, "base", &options(&scene))?;
        let reader = memory(&lazy);
        let mut pages = (0..6000).step_by(STRIDE);
        let mut next = || -> Outcome {
            let number = pages.next().ok_or("there are more pages")?;
            assert_eq!(page(&reader, number)?, bytes[number * PAGE..][..PAGE]);
            Ok(())
        };
        // Until it is known what is late, and one may be asked for again, whatever was late
        // on the way.
        let is_ready = || {
            let counts = lazy.counts();
            counts.demand.requests >= 20 * (counts.hedges + 2)
        };
        while !is_ready() {
            next()?;
        }
        let before = lazy.counts();
        proxy.hold_open();
        next()?;
        let counts = lazy.counts();
        assert!(counts.hedges > before.hedges, "{counts:?}");
        assert!(counts.hedges_won > before.hedges_won, "{counts:?}");
        assert_eq!(counts.demand.failed, before.demand.failed, "{counts:?}");
        proxy.mend();
        lazy.end();
    }
    Ok(())
}
