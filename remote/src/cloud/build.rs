//! How a bucket is reached: addresses from the place, credentials from the environment or
//! from a file that only its owner can read.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};

use super::count::{Counter, Counting, METADATA};
use crate::error::{Error, Result};
use crate::place::Place;

const CONNECT: Duration = Duration::from_secs(10);
/// A server that sends nothing for so long, or takes so long for a part of 8 MiB.
const SILENT: Duration = Duration::from_secs(60);
const RETRY_SECONDS: u64 = 60;
/// The time is the bound: pauses grow from a tenth of a second to ten.
const MOST_RETRIES: usize = 1000;
const MOST_CREDENTIALS_BYTES: u64 = 64 << 10;

/// What becomes of a connection that has nothing to do.
#[derive(Clone, Copy)]
pub enum Idle {
    /// The next request takes it.
    Kept,
    /// It is closed: each request has its own.
    Closed,
}

/// A client of the bucket.
pub fn store(
    place: &Place,
    (scheme, bucket): (&str, &str),
    silent: Option<Duration>,
    idle: Idle,
    counter: &Arc<Counter>,
) -> Result<Box<dyn ObjectStore>> {
    // There is one already if this is not the first bucket.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let connector = Counting {
        counter: Arc::clone(counter),
        asks_machine: place.machine_role,
    };
    let credentials = credentials(place)?;
    let wrong = |error: object_store::Error| place.unusable(error.to_string());
    match scheme {
        "s3" => {
            let mut builder = AmazonS3Builder::from_env()
                // One deletion at a time is what every server knows.
                .with_disable_bulk_delete(true)
                .with_bucket_name(bucket)
                .with_retry(retry(place, silent))
                .with_client_options(client(silent, idle))
                .with_http_connector(connector);
            for (name, value) in credentials {
                builder = builder.with_config(name.parse().map_err(wrong)?, value);
            }
            if !place.machine_role {
                // Whatever the environment calls it: `Counting` refuses this one.
                builder = builder.with_metadata_endpoint(format!("http://{}", METADATA[0]));
            }
            if let Some(region) = &place.region {
                builder = builder.with_region(region);
            }
            if let Some(endpoint) = &place.endpoint {
                // Of the environment's two variables the other one would count before this.
                builder = builder
                    .with_endpoint(endpoint)
                    .with_config(AmazonS3ConfigKey::S3Endpoint, endpoint);
            }
            let keys = [AmazonS3ConfigKey::S3Endpoint, AmazonS3ConfigKey::Endpoint];
            let endpoint = keys.iter().find_map(|key| builder.get_config_value(key));
            check_hidden(place, endpoint)?;
            if place.allow_http {
                builder = builder.with_allow_http(true);
            }
            Ok(Box::new(builder.build().map_err(wrong)?))
        }
        "gs" => {
            let mut options = client(silent, idle);
            if place.allow_http {
                options = options.with_allow_http(true);
            }
            let mut builder = GoogleCloudStorageBuilder::from_env()
                .with_bucket_name(bucket)
                .with_retry(retry(place, silent))
                .with_client_options(options)
                .with_http_connector(connector);
            for (name, value) in credentials {
                builder = builder.with_config(name.parse().map_err(wrong)?, value);
            }
            if let Some(endpoint) = &place.endpoint {
                builder = builder.with_base_url(endpoint);
            }
            check_hidden(place, builder.get_config_value(&GoogleConfigKey::BaseUrl))?;
            Ok(Box::new(builder.build().map_err(wrong)?))
        }
        _ => {
            let mut builder = MicrosoftAzureBuilder::from_env()
                .with_container_name(bucket)
                .with_retry(retry(place, silent))
                .with_client_options(client(silent, idle))
                .with_http_connector(connector);
            for (name, value) in credentials {
                builder = builder.with_config(name.parse().map_err(wrong)?, value);
            }
            if let Some(endpoint) = &place.endpoint {
                builder = builder.with_endpoint(endpoint.clone());
            }
            check_hidden(place, builder.get_config_value(&AzureConfigKey::Endpoint))?;
            if place.allow_http {
                builder = builder.with_allow_http(true);
            }
            Ok(Box::new(builder.build().map_err(wrong)?))
        }
    }
}

fn client(silent: Option<Duration>, idle: Idle) -> ClientOptions {
    let options = match idle {
        Idle::Kept => ClientOptions::new(),
        Idle::Closed => ClientOptions::new().with_pool_max_idle_per_host(0),
    };
    options
        .with_connect_timeout(silent.unwrap_or(CONNECT))
        .with_read_timeout(silent.unwrap_or(SILENT))
        // A long object takes as long as the line needs.
        .with_timeout_disabled()
}

fn retry(place: &Place, silent: Option<Duration>) -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(10),
            base: 2.0,
        },
        max_retries: silent.map_or(MOST_RETRIES, |_| 0),
        retry_timeout: Duration::from_secs(place.retry_seconds.unwrap_or(RETRY_SECONDS)),
    }
}

/// That nothing goes over the network in clear without leave, wherever the endpoint was named:
/// in the place, in its file of credentials or in the environment.
fn check_hidden(place: &Place, endpoint: Option<String>) -> Result<()> {
    let is_clear = |endpoint: &String| {
        let scheme = endpoint.trim_start().get(..7);
        scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case("http://"))
    };
    match endpoint.filter(is_clear) {
        Some(endpoint) if !place.allow_http => Err(Error::InClear {
            url: place.url.clone(),
            endpoint,
        }),
        _ => Ok(()),
    }
}

/// What the file of the place says: names as those of the environment's variables.
fn credentials(place: &Place) -> Result<Vec<(String, String)>> {
    let Some(path) = &place.credentials else {
        return Ok(Vec::new());
    };
    let told = |why: &str| place.unusable(format!("its credentials in {}: {why}", path.display()));
    let found = fs::metadata(path).map_err(|error| told(&error.to_string()))?;
    if !found.is_file() || found.len() > MOST_CREDENTIALS_BYTES {
        return Err(told("it is no file, or too long"));
    }
    if found.permissions().mode() & 0o077 != 0 {
        return Err(told("others may read it: chmod 600"));
    }
    let text = fs::read_to_string(path).map_err(|error| told(&error.to_string()))?;
    let lines = text.lines().map(str::trim);
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| match line.split_once('=') {
            Some((name, value)) => Ok((name.trim().to_ascii_lowercase(), value.trim().to_owned())),
            None => Err(told("a line in it is not NAME=VALUE")),
        })
        .collect()
}
