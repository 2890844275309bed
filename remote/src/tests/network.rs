//! What only buckets over the network have: conditions, pages, keys, and servers that
//! fail or lie.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Mutex;
use std::thread;

use snapstore_tests::servers::{AZURE, S3};

use super::over::over;
use super::{Outcome, Scene};
use crate::protocol::{self, Unanswered};
use crate::{Error, Place, Remote};

/// The answers of a server, in order; the last one is repeated. It reads each request.
fn server(
    answers: Vec<Vec<u8>>,
) -> Result<(tempfile::TempDir, Remote), Box<dyn std::error::Error>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let endpoint = format!("http://{}", listener.local_addr()?);
    let answers = Mutex::new((answers, 0));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answer = {
                let mut answers = answers.lock().expect("no thread panics");
                let at = answers.1.min(answers.0.len() - 1);
                answers.1 += 1;
                answers.0[at].clone()
            };
            // Whoever has read enough hangs up.
            let _ = answer_one(stream, &answer);
        }
    });
    let dir = tempfile::tempdir()?;
    let place = place(&dir, &endpoint)?;
    let remote = Remote::at(&place)?;
    Ok((dir, remote))
}

fn answer_one(mut stream: TcpStream, answer: &[u8]) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut line, mut body) = (String::new(), 0);
    while reader.read_line(&mut line)? > 2 {
        if let Some(len) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            body = len.trim().parse().unwrap_or(0);
        }
        line.clear();
    }
    std::io::copy(&mut reader.take(body), &mut std::io::sink())?;
    stream.write_all(answer)
}

fn place(dir: &tempfile::TempDir, endpoint: &str) -> Result<Place, Box<dyn std::error::Error>> {
    let credentials = dir.path().join("credentials");
    fs::write(
        &credentials,
        "AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=b\n",
    )?;
    fs::set_permissions(&credentials, fs::Permissions::from_mode(0o600))?;
    Ok(Place {
        url: "s3://bucket/at".to_owned(),
        endpoint: Some(endpoint.to_owned()),
        region: Some("here".to_owned()),
        allow_http: true,
        credentials: Some(credentials),
        machine_role: false,
        retry_seconds: Some(1),
        key: None,
    })
}

fn http(status: &str, head: &str, body: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 {status}\r\nConnection: close\r\nETag: \"a\"\r\n\
         Last-Modified: Sun, 29 Nov 2026 00:00:00 GMT\r\nContent-Length: {}\r\n{head}\r\n{body}",
        body.len()
    )
    .into_bytes()
}

fn listing(keys: &[&str]) -> Vec<u8> {
    let object = |key: &&str| {
        format!(
            "<Contents><Key>{key}</Key><LastModified>2026-11-29T00:00:00.000Z</LastModified>\
             <ETag>\"a\"</ETag><Size>5</Size><StorageClass>STANDARD</StorageClass></Contents>"
        )
    };
    let objects: String = keys.iter().map(object).collect();
    let body = format!(
        "<?xml version=\"1.0\"?><ListBucketResult><Name>bucket</Name>\
         <IsTruncated>false</IsTruncated>{objects}</ListBucketResult>"
    );
    http("200 OK", "Content-Type: application/xml\r\n", &body)
}

/// As after a copy of a running machine: the first one's object stays.
fn two_hosts_that_draw_the_same_name(scene: &Scene) -> Outcome {
    let (one, other) = (scene.remote()?, scene.remote()?);
    one.bucket.put("heads/a", b"of one")?;
    let refused: Result<(), Unanswered> = other.bucket.put("heads/a", b"of the other");
    let why = refused.err().and_then(|error| error.wrong);
    assert!(why.is_some_and(|why| why.contains("copies")), "{why:?}");
    assert_eq!(scene.bytes("heads/a")?, b"of one");
    Ok(())
}

#[test]
fn two_hosts_that_draw_the_same_name_are_told_of_it() -> Outcome {
    let name = "two_hosts_that_draw_the_same_name_are_told_of_it";
    over(name, || Scene::of(&S3), two_hosts_that_draw_the_same_name)?;
    over(
        name,
        || Scene::of(&AZURE),
        two_hosts_that_draw_the_same_name,
    )
}

#[test]
fn a_listing_of_many_pages_is_whole() -> Outcome {
    let name = "a_listing_of_many_pages_is_whole";
    over(
        name,
        || Scene::of(&S3),
        |scene| {
            let remote = scene.remote()?;
            for number in 0..1100 {
                remote.bucket.put(&format!("packs/{number:04}"), b"a")?;
            }
            let before = remote.requests().ok_or("it counts")?.list;
            assert_eq!(scene.keys("packs")?.len(), 1100);
            assert_eq!(remote.bucket.list("packs/")?.len(), 1100);
            let pages = remote.requests().ok_or("it counts")?.list - before;
            assert_eq!(pages, 2);
            Ok(())
        },
    )
}

#[test]
fn a_request_that_is_refused_for_a_while_is_made_again_and_counted() -> Outcome {
    let busy = http("503 Slow Down", "", "busy");
    let (_dir, remote) = server(vec![busy.clone(), busy, http("200 OK", "", "")])?;
    remote.bucket.put("config", b"a")?;
    let requests = remote.requests().ok_or("it counts")?;
    assert_eq!((requests.put, requests.failed), (3, 2), "{requests:?}");
    Ok(())
}

/// An earlier attempt, whose answer was lost: one read sees it, and the next one may not.
#[test]
fn what_is_there_already_is_written_again_until_that_is_acknowledged() -> Outcome {
    let exists = http("412 Precondition Failed", "", "");
    let (written, there) = (http("200 OK", "", ""), http("200 OK", "", "a"));
    let (_dir, remote) = server(vec![exists, there, written])?;
    remote.bucket.put("config", b"a")?;
    let requests = remote.requests().ok_or("it counts")?;
    assert_eq!((requests.put, requests.get), (2, 1), "{requests:?}");
    Ok(())
}

/// That a server is not there says nothing about its objects.
#[test]
fn a_server_that_is_gone_is_no_bucket_without_objects() -> Outcome {
    let dir = tempfile::tempdir()?;
    // The port is free again when the listener is gone.
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let remote = Remote::at(&place(&dir, &format!("http://{address}"))?)?;
    let unanswered =
        |error: &Error| matches!(error, Error::Protocol(protocol::Error::Unanswered(_)));
    assert!(remote.tags().is_err_and(|error| unanswered(&error)));
    assert!(remote.init(4096).is_err_and(|error| unanswered(&error)));
    assert!(remote.bucket.list("packs/").is_err());
    assert!(remote.bucket.exists("packs/a").is_err());
    assert!(remote.bucket.delete("packs/a").is_err());
    Ok(())
}

#[test]
fn a_bucket_that_is_gone_is_no_bucket_without_objects() -> Outcome {
    let body = "<Error><Code>NoSuchBucket</Code></Error>";
    let (_dir, remote) = server(vec![http("404 Not Found", "", body)])?;
    assert!(remote.bucket.get("packs/a", None).is_err());
    assert!(remote.bucket.list("packs/").is_err());
    let refused = remote.bucket.put("packs/a", b"a");
    let told = |error: Unanswered| error.to_string().contains("no such bucket");
    assert!(refused.is_err_and(told));
    Ok(())
}

#[test]
fn keys_that_are_refused_are_named_as_that() -> Outcome {
    let body = "<Error><Code>AccessDenied</Code><Message>\u{1b}[31mno</Message></Error>";
    let (_dir, remote) = server(vec![http("403 Forbidden", "", body)])?;
    let error = remote.bucket.put("config", b"a");
    let error = error.err().ok_or("it is refused")?.to_string();
    assert!(
        error.contains("credentials") && error.contains("AccessDenied"),
        "{error}"
    );
    assert!(!error.contains('\u{1b}'), "{error:?}");
    Ok(())
}

/// More than any host writes is neither kept in memory nor waited for.
#[test]
fn what_a_server_sends_too_much_of_is_not_read() -> Outcome {
    let long = "HTTP/1.1 200 OK\r\nConnection: close\r\nETag: \"a\"\r\n\
         Last-Modified: Sun, 29 Nov 2026 00:00:00 GMT\r\nContent-Length: 1099511627776\r\n\r\n";
    let (_dir, remote) = server(vec![long.as_bytes().to_vec()])?;
    let error = remote.bucket.get("config", None).err().ok_or("refused")?;
    assert!(error.wrong.is_some(), "{error}");
    let error = remote.bucket.get("packs/a", None).err().ok_or("refused")?;
    assert!(error.wrong.is_some(), "{error}");
    Ok(())
}

#[test]
fn a_listing_of_what_was_not_asked_for_is_refused() -> Outcome {
    for (keys, told) in [
        (&["at/packs/a", "at/heads/a"][..], "at/heads/a"),
        (&["elsewhere/packs/a"], "elsewhere/packs/a"),
        (&["at/packs/../../a"], "packs/../../a"),
        (&["at/packs//a"], "packs//a"),
        (
            &["at/packs/a", "at/packs/\u{e4}//b\u{85}"],
            "packs/\u{e4}//b\\u{85}",
        ),
    ] {
        let (_dir, remote) = server(vec![listing(keys)])?;
        let error = remote.bucket.list("packs/");
        let error = error.err().ok_or_else(|| format!("{keys:?} is listed"))?;
        assert!(error.wrong.is_some(), "{keys:?}: {error}");
        assert_eq!(error.key, told);
    }
    let (_dir, remote) = server(vec![listing(&["at/packs/a"])])?;
    assert_eq!(remote.bucket.list("packs/")?.len(), 1);
    let (_dir, remote) = server(vec![http("200 OK", "", "no XML")])?;
    assert!(remote.bucket.list("packs/").is_err());
    Ok(())
}

#[test]
fn credentials_that_others_can_read_are_refused() -> Outcome {
    let dir = tempfile::tempdir()?;
    let place = place(&dir, "http://127.0.0.1:1")?;
    let path = place.credentials.clone().ok_or("a file")?;
    Remote::at(&place)?;
    let says = |word: &str| match Remote::at(&place) {
        Err(error @ Error::Unusable { .. }) => error.to_string().contains(word),
        _ => false,
    };
    for mode in [0o640, 0o604, 0o644] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        assert!(says("others may read it"), "{mode:o}");
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    fs::write(&path, "# a comment\n\nAWS_ACCESS_KEY_ID a\n")?;
    assert!(says("not NAME=VALUE"));
    fs::write(&path, "AWS_NO_SUCH_NAME=a\n")?;
    assert!(says("no_such_name"));
    fs::remove_file(&path)?;
    assert!(says("credentials"));
    Ok(())
}

/// Whether the environment has some; then such a test is skipped.
fn has_keys(test: &str) -> bool {
    let keys = [
        "AWS_ACCESS_KEY",
        "AWS_SECRET_",
        "AWS_WEB_",
        "AWS_CONTAINER_",
    ];
    let is_key = |name: String| keys.iter().any(|key| name.starts_with(key));
    let has_keys = std::env::vars().any(|(name, _)| is_key(name));
    if has_keys {
        println!("SKIPPED {test}: the environment has keys");
    }
    has_keys
}

/// That address is of whoever answers there.
#[test]
fn without_keys_the_machine_is_not_asked_for_any() -> Outcome {
    if has_keys("without_keys_the_machine_is_not_asked_for_any") {
        return Ok(());
    }
    let (_dir, remote) = server(vec![http("200 OK", "", "a")])?;
    let place = Place {
        credentials: None,
        ..remote.place.clone()
    };
    let asked = Remote::at(&place)?.bucket.get("config", None);
    let error = asked.err().ok_or("nothing is signed")?;
    assert!(error.changed_nothing(), "{error:?}");
    let error = error.to_string();
    assert!(error.contains("--machine-role"), "{error}");
    assert!(error.contains("AWS_ACCESS_KEY_ID"), "{error}");
    Ok(())
}

/// What asks it, with these lines as credentials, and what it was asked: requests and their
/// heads.
fn asked_with(lines: &str) -> Result<(Remote, Asked), Box<dyn std::error::Error>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let endpoint = format!("http://{}", listener.local_addr()?);
    let asked = Asked::default();
    let heads = asked.clone();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
            let head: Vec<String> = lines.by_ref().take_while(|line| !line.is_empty()).collect();
            heads.lock().expect("no panic").push(head.join("\n"));
            drop(lines);
            let _ = stream.write_all(&http("200 OK", "", "a"));
        }
    });
    let dir = tempfile::tempdir()?;
    let place = place(&dir, &endpoint)?;
    let path = place.credentials.as_ref().ok_or("a file")?;
    fs::write(path, lines.replace("{here}", &endpoint))?;
    Ok((Remote::at(&place)?, asked))
}

type Asked = std::sync::Arc<Mutex<Vec<String>>>;

#[test]
fn a_public_bucket_is_asked_without_keys_and_nobody_else_is() -> Outcome {
    let (remote, asked) = asked_with("AWS_SKIP_SIGNATURE=true\n")?;
    assert_eq!(
        remote.bucket.get("config", None)?.as_deref(),
        Some(&b"a"[..])
    );
    let asked = asked.lock().expect("no panic");
    assert_eq!(asked.len(), 1, "{asked:?}");
    assert!(asked[0].starts_with("GET /bucket/at/config "), "{asked:?}");
    let head = asked[0].to_ascii_lowercase();
    assert!(!head.contains("authorization") && !head.contains("x-amz-security-token"));
    Ok(())
}

/// Whatever it is called.
#[test]
fn another_address_for_the_machines_keys_is_not_asked_either() -> Outcome {
    if has_keys("another_address_for_the_machines_keys_is_not_asked_either") {
        return Ok(());
    }
    let (remote, asked) = asked_with("AWS_METADATA_ENDPOINT={here}\n")?;
    let error = remote.bucket.get("config", None);
    let error = error.err().ok_or("nothing is signed")?;
    assert!(error.to_string().contains("AWS_SKIP_SIGNATURE"), "{error}");
    let asked = asked.lock().expect("no panic");
    assert!(asked.is_empty(), "{asked:?}");
    Ok(())
}

#[test]
fn a_place_that_cannot_be_is_refused() -> Outcome {
    for url in [
        "snaps",
        "s3://",
        "file://relative",
        "http://host/",
        "s3:///a",
    ] {
        let refused = Remote::at(&Place::new(url));
        assert!(matches!(refused, Err(Error::BadUrl { .. })), "{url}");
    }
    let mut place = Place::new("file:///tmp/bucket");
    place.allow_http = true;
    assert!(matches!(Remote::at(&place), Err(Error::Unusable { .. })));
    let dir = tempfile::tempdir()?;
    let place = super::network::place(&dir, "http://127.0.0.1:1")?;
    for url in ["s3://bucket/a//b", "s3://bucket/../a"] {
        let place = Place {
            url: url.to_owned(),
            ..place.clone()
        };
        assert!(
            matches!(Remote::at(&place), Err(Error::Unusable { .. })),
            "{url}"
        );
    }
    // Without leave, nothing is sent in clear.
    let place = Place {
        allow_http: false,
        ..place
    };
    let refused = |place: &Place| matches!(Remote::at(place), Err(Error::InClear { .. }));
    for (url, endpoint) in [
        ("s3://bucket", "http://127.0.0.1:1"),
        ("az://bucket", "HTTP://127.0.0.1:1"),
        ("gs://bucket", "http://127.0.0.1:1"),
    ] {
        let credentials = place.credentials.clone().filter(|_| url.starts_with("s3"));
        let place = Place {
            url: url.to_owned(),
            endpoint: Some(endpoint.to_owned()),
            credentials,
            ..place.clone()
        };
        assert!(refused(&place), "{url}");
    }
    // Nor where the file of credentials names the endpoint.
    let credentials = place.credentials.clone().ok_or("a file")?;
    let mut text = fs::read_to_string(&credentials)?;
    text += "AWS_ENDPOINT=http://127.0.0.1:1\nAWS_ALLOW_HTTP=true\n";
    fs::write(&credentials, text)?;
    let place = Place {
        endpoint: None,
        ..place
    };
    assert!(refused(&place));
    Remote::at(&Place {
        allow_http: true,
        ..place
    })?;
    Ok(())
}
