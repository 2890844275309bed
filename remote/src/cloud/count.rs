//! Counts requests as they leave, and bounds answers that are kept in memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use http_body_util::{BodyExt as _, Limited};
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
    HttpResponseBody, HttpService, ReqwestConnector,
};

use crate::objects::Requests;

/// A page of a listing, or what is said of an error: 5000 names of 1 KiB are shorter.
const MOST_TOLD_BYTES: usize = 32 << 20;
/// Of objects, what reads them has the bound.
const MOST_OBJECT_BYTES: usize = 2 << 30;

/// Where providers tell machines of theirs who they are.
pub const METADATA: [&str; 3] = [
    "169.254.169.254",
    "[fd00:ec2::254]",
    "metadata.google.internal",
];

/// What is told where there are no keys, and the machine may not be asked.
pub const NO_CREDENTIALS: &str = "there are no credentials: set the provider's variables \
    (such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), name a file of them with `snapstore \
    remote add --credentials`, or have the machine's own role asked for with `--machine-role`; \
    AWS_SKIP_SIGNATURE=true has a bucket asked without any";

/// Requests so far.
#[derive(Debug, Default)]
pub struct Counter {
    get: AtomicU64,
    head: AtomicU64,
    list: AtomicU64,
    put: AtomicU64,
    post: AtomicU64,
    delete: AtomicU64,
    failed: AtomicU64,
}

impl Counter {
    pub fn requests(&self) -> Requests {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Requests {
            get: of(&self.get),
            head: of(&self.head),
            list: of(&self.list),
            put: of(&self.put),
            post: of(&self.post),
            delete: of(&self.delete),
            failed: of(&self.failed),
        }
    }

    fn of(&self, method: &str, is_list: bool) -> &AtomicU64 {
        match method {
            _ if is_list => &self.list,
            "HEAD" => &self.head,
            "PUT" => &self.put,
            "POST" => &self.post,
            "DELETE" => &self.delete,
            _ => &self.get,
        }
    }
}

/// Makes clients that count.
#[derive(Debug)]
pub struct Counting {
    pub counter: Arc<Counter>,
    /// Whether the machine may be asked for credentials. Elsewhere than at that provider
    /// anybody may answer there.
    pub asks_machine: bool,
}

impl HttpConnector for Counting {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Client {
            counter: Arc::clone(&self.counter),
            asks_machine: self.asks_machine,
            client: ReqwestConnector::default().connect(options)?,
        }))
    }
}

/// hyper's word for a request that waited for a connection which was closed then, as when a server
/// ends: nothing of it was sent.
const NEVER_SENT: &str = "operation was canceled";

/// An error as what it is. The store sends again what it knows was not sent, and does not know this.
fn sorted(error: HttpError) -> HttpError {
    let mut cause: Option<&dyn std::error::Error> = Some(&error);
    let mut is_never_sent = false;
    while let Some(one) = cause {
        is_never_sent |= one.to_string().contains(NEVER_SENT);
        cause = one.source();
    }
    match error.kind() {
        HttpErrorKind::Unknown if is_never_sent => HttpError::new(HttpErrorKind::Request, error),
        _ => error,
    }
}

#[derive(Debug)]
struct Client {
    counter: Arc<Counter>,
    asks_machine: bool,
    client: HttpClient,
}

#[async_trait]
impl HttpService for Client {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let host = request.uri().host().unwrap_or_default();
        if !self.asks_machine && METADATA.contains(&host) {
            let none = std::io::Error::other(NO_CREDENTIALS);
            // This kind is not tried again.
            return Err(HttpError::new(HttpErrorKind::Unknown, none));
        }
        let query = request.uri().query().unwrap_or_default();
        let is_list = request.method() == "GET"
            && (query.contains("list-type=2") || query.contains("comp=list"));
        let is_object = request.method() == "GET" && !is_list;
        let count = self.counter.of(request.method().as_str(), is_list);
        count.fetch_add(1, Ordering::Relaxed);
        let answer = self.client.execute(request).await.map_err(sorted);
        let is_failed = answer.as_ref().map_or(true, |answer| {
            answer.status().as_u16() >= 400 && answer.status() != 404
        });
        if is_failed {
            self.counter.failed.fetch_add(1, Ordering::Relaxed);
        }
        let most = match is_object {
            true => MOST_OBJECT_BYTES,
            false => MOST_TOLD_BYTES,
        };
        Ok(answer?.map(|body| {
            let bounded = Limited::new(body, most);
            HttpResponseBody::new(
                bounded.map_err(|error| match error.downcast::<HttpError>() {
                    Ok(error) => *error,
                    Err(error) => {
                        HttpError::new(HttpErrorKind::Decode, std::io::Error::other(error))
                    }
                }),
            )
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_never_sent_is_sent_again() {
        for (kind, told, expected) in [
            (
                HttpErrorKind::Unknown,
                "operation was canceled: connection was not ready",
                HttpErrorKind::Request,
            ),
            (
                HttpErrorKind::Unknown,
                NO_CREDENTIALS,
                HttpErrorKind::Unknown,
            ),
            (
                HttpErrorKind::Decode,
                "operation was canceled",
                HttpErrorKind::Decode,
            ),
        ] {
            let cause = std::io::Error::other(std::io::Error::other(told));
            let error = sorted(HttpError::new(kind, cause));
            assert_eq!(error.kind(), expected, "{told}");
        }
    }
}
