//! Serves HTTP: counts, does wrong, and hands the rest to `s3s`.

use std::{
    collections::HashMap,
    io,
    net::TcpListener,
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body as _, Incoming},
    header::{AUTHORIZATION, CONTENT_TYPE, DATE, HeaderValue},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use s3s::service::{S3Service, S3ServiceBuilder};
use tokio::sync::oneshot;

use super::{
    ServerOptions,
    backend::Backend,
    body::{ReplyBody, Spoil},
    faults::{Counts, Faults, Traffic, Wrong},
    policy::Policy,
};

const ADMIN: &str = "/_admin/";

/// The S3 service, with what tests watch and steer.
pub(super) struct ServerState {
    pub(super) backend: Backend,
    service: S3Service,
    bucket: String,
    /// What access keys may do that may not do everything.
    policies: HashMap<String, Policy>,
    faults: Arc<Mutex<Faults>>,
    requests: Mutex<Counts>,
    traffic: Arc<Traffic>,
}

impl ServerState {
    pub(super) fn new(options: &ServerOptions) -> Self {
        let faults = Arc::new(Mutex::new(options.faults.clone()));
        let backend = Backend::new(&options.bucket, options.dir.clone(), Arc::clone(&faults));
        let mut builder = S3ServiceBuilder::new(backend.clone());
        let mut auth =
            s3s::auth::SimpleAuth::from_single(options.access_key.as_str(), options.secret_key.as_str());
        for key in &options.restricted {
            auth.register(key.access_key.clone(), key.secret_key.clone().into());
        }
        builder.set_auth(auth);
        let policy = |key: &super::RestrictedKey| (key.access_key.clone(), Policy::parse(&key.policy));
        Self {
            backend,
            service: builder.build(),
            bucket: options.bucket.clone(),
            policies: options.restricted.iter().map(policy).collect(),
            faults,
            requests: Mutex::default(),
            traffic: Arc::default(),
        }
    }

    pub(super) fn counts(&self) -> Counts {
        let mut counts = self.requests.lock().unwrap().clone();
        counts.bytes_sent = self.traffic.sent.load(Ordering::Relaxed);
        counts.bytes_received = self.traffic.received.load(Ordering::Relaxed);
        counts.faults = self.traffic.faults.load(Ordering::Relaxed);
        counts
    }

    pub(super) fn reset_counts(&self) {
        *self.requests.lock().unwrap() = Counts::default();
        self.traffic.reset();
    }

    pub(super) fn set_faults(&self, faults: Faults) {
        *self.faults.lock().unwrap() = faults;
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Response<ReplyBody>, io::Error> {
        if request.uri().path().starts_with(ADMIN) {
            return Ok(self.administer(request).await);
        }
        let operation = operation(&request);
        let faults = self.faults.lock().unwrap().clone();
        let number = {
            let mut counts = self.requests.lock().unwrap();
            let number = counts.total();
            *counts.requests.entry(operation.to_owned()).or_default() += 1;
            if let Some(signer) = signer(&request) {
                let of_key = counts.by_key.entry(signer.to_owned()).or_default();
                *of_key.entry(operation.to_owned()).or_default() += 1;
            }
            number
        };
        self.traffic.received.fetch_add(
            request.body().size_hint().exact().unwrap_or_default(),
            Ordering::Relaxed,
        );
        if faults.latency_ms > 0 {
            tokio::time::sleep(Duration::from_millis(faults.latency_ms)).await;
        }
        let permitted = self.permits(&request, operation);
        let path = request.uri().path();
        let lands_later = faults.land_later_ms > 0
            && operation == "PutObject"
            && faults.land_later_keys.iter().any(|key| path.contains(key));
        let refused = operation == "PutObject" && faults.refused_keys.iter().any(|key| path.contains(key));
        let wrong = faults
            .choose(operation, number)
            .or(refused.then_some(Wrong::SlowDown))
            .or((!permitted).then_some(Wrong::Forbidden))
            .or(lands_later.then_some(Wrong::LandsLater(faults.land_later_ms)));
        // One that lands later counts from when it is here whole.
        if wrong.is_some_and(|wrong| !matches!(wrong, Wrong::LandsLater(_))) {
            self.traffic.faults.fetch_add(1, Ordering::Relaxed);
        }
        let mut reply = self.reply(request, operation, wrong).await?;
        let date = SystemTime::now();
        let skew = Duration::from_secs(faults.date_skew_secs.unsigned_abs());
        let date = if faults.date_skew_secs < 0 {
            date - skew
        } else {
            date + skew
        };
        let date = HeaderValue::from_str(&httpdate::fmt_http_date(date)).expect("a date is plain text");
        reply.headers_mut().insert(DATE, date);
        Ok(reply)
    }

    /// Whether the access key that signed a request may do it.
    fn permits(&self, request: &Request<Incoming>, operation: &str) -> bool {
        let Some(policy) = signer(request).and_then(|signer| self.policies.get(signer)) else {
            return true;
        };
        let path = request.uri().path().trim_start_matches('/');
        // Keys of a store have no character that is escaped in a URL.
        let key = path
            .split_once('/')
            .map(|(_, key)| key)
            .filter(|key| !key.is_empty());
        policy.permits(operation, &self.bucket, key)
    }

    /// Returns an error where the connection is to be closed without a reply.
    async fn reply(
        &self,
        request: Request<Incoming>,
        operation: &str,
        wrong: Option<Wrong>,
    ) -> Result<Response<ReplyBody>, io::Error> {
        let closed = || Err(io::ErrorKind::ConnectionReset.into());
        match wrong {
            Some(Wrong::Down) => return closed(),
            Some(Wrong::Reset) if operation != "GetObject" => return closed(),
            Some(Wrong::Stall) if operation != "GetObject" => {
                // Longer than any client waits; ends when it closes its end or the server stops.
                tokio::time::sleep(Duration::from_secs(300)).await;
                return closed();
            }
            Some(Wrong::Forbidden) => return Ok(self.refuse(request, 403, "AccessDenied").await),
            Some(Wrong::Error500) => return Ok(self.refuse(request, 500, "InternalError").await),
            Some(Wrong::SlowDown) => return Ok(self.refuse(request, 503, "SlowDown").await),
            Some(Wrong::Conflict) => {
                return Ok(self.refuse(request, 409, "ConditionalRequestConflict").await);
            }
            Some(Wrong::LostReply | Wrong::Reset | Wrong::Stall | Wrong::Flip | Wrong::LandsLater(_))
            | None => {}
        }
        let reply = match wrong {
            Some(Wrong::LandsLater(millis)) => self.land_later(request, millis).await?,
            _ => self.service.call(request.map(s3s::Body::from)).await,
        };
        let reply = reply.map_err(io::Error::other)?;
        if wrong == Some(Wrong::LostReply) {
            return closed();
        }
        let half = reply.body().size_hint().exact().unwrap_or_default() / 2;
        let spoil = match wrong {
            Some(Wrong::Reset) => Some(Spoil::CutAfter(half)),
            Some(Wrong::Stall) => Some(Spoil::StallAfter(half)),
            Some(Wrong::Flip) => Some(Spoil::Flip),
            _ => None,
        };
        Ok(reply.map(|inner| self.body(inner, spoil)))
    }

    /// Does what is asked after a while, also when its sender has gone.
    async fn land_later(
        &self,
        request: Request<Incoming>,
        millis: u64,
    ) -> Result<s3s::S3Result<Response<s3s::Body>, s3s::HttpError>, io::Error> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
        self.traffic.faults.fetch_add(1, Ordering::Relaxed);
        let service = self.service.clone();
        let landing = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(millis)).await;
            service
                .call(Request::from_parts(head, s3s::Body::from(body)))
                .await
        });
        landing.await.map_err(io::Error::other)
    }

    fn body(&self, inner: s3s::Body, spoil: Option<Spoil>) -> ReplyBody {
        ReplyBody {
            inner,
            spoil,
            passed: 0,
            rest: None,
            traffic: Arc::clone(&self.traffic),
        }
    }

    /// Answers with an error of S3, after the request was read to its end, as servers do
    /// that want to keep the connection.
    async fn refuse(&self, request: Request<Incoming>, status: u16, code: &str) -> Response<ReplyBody> {
        let head = request.method() == Method::HEAD;
        // A client that goes away in the middle is answered into the void.
        let _ = request.into_body().collect().await;
        let text = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>a fault of the test</Message></Error>"
        );
        let body = if head { String::new() } else { text };
        let mut reply = Response::new(self.body(s3s::Body::from(body), None));
        *reply.status_mut() = StatusCode::from_u16(status).expect("statuses here are numbers of HTTP");
        reply
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static("application/xml"));
        reply
    }

    async fn administer(&self, request: Request<Incoming>) -> Response<ReplyBody> {
        let what = request.uri().path()[ADMIN.len()..].to_owned();
        let method = request.method().clone();
        let answer = match (method, what.as_str()) {
            (Method::GET, "counts") => serde_json::to_string(&self.counts()).map_err(|err| err.to_string()),
            (Method::GET, "objects") => {
                serde_json::to_string(&self.backend.objects()).map_err(|err| err.to_string())
            }
            (Method::POST, "faults") => self.faults_from(request).await,
            (Method::POST, "reset") => {
                self.set_faults(Faults::default());
                self.reset_counts();
                Ok("{}".to_owned())
            }
            (method, what) => Err(format!("there is no {method} {ADMIN}{what}")),
        };
        let (status, text) = match answer {
            Ok(text) => (StatusCode::OK, text),
            Err(text) => (StatusCode::BAD_REQUEST, text),
        };
        let mut reply = Response::new(self.body(s3s::Body::from(text), None));
        *reply.status_mut() = status;
        reply
    }

    async fn faults_from(&self, request: Request<Incoming>) -> Result<String, String> {
        let body = Limited::new(request.into_body(), 1 << 20);
        let bytes: Bytes = body.collect().await.map_err(|err| err.to_string())?.to_bytes();
        let faults = serde_json::from_slice(&bytes).map_err(|err| err.to_string())?;
        self.set_faults(faults);
        Ok("{}".to_owned())
    }
}

/// The access key that signed a request.
fn signer(request: &Request<Incoming>) -> Option<&str> {
    let signature = request.headers().get(AUTHORIZATION)?.to_str().ok()?;
    let (_, rest) = signature.split_once("Credential=")?;
    rest.split('/').next()
}

/// The name of a request in S3, for those that the program sends.
fn operation(request: &Request<Incoming>) -> &'static str {
    let path = request.uri().path();
    let has_key = path
        .trim_start_matches('/')
        .split_once('/')
        .is_some_and(|(_, key)| !key.is_empty());
    let query = request.uri().query().unwrap_or_default();
    let deletes = query.split('&').any(|pair| pair == "delete" || pair == "delete=");
    let lists = query.split('&').any(|pair| pair == "list-type=2");
    match (request.method().as_str(), has_key) {
        ("GET", true) => "GetObject",
        ("HEAD", true) => "HeadObject",
        ("PUT", true) if request.headers().contains_key("x-amz-copy-source") => "CopyObject",
        ("PUT", true) => "PutObject",
        ("DELETE", true) => "DeleteObject",
        ("GET", false) if lists => "ListObjectsV2",
        ("POST", false) if deletes => "DeleteObjects",
        ("HEAD", false) => "HeadBucket",
        _ => "Other",
    }
}

/// Serves until told to stop.
pub(super) fn run(listener: TcpListener, state: Arc<ServerState>, mut stopped: oneshot::Receiver<()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("s3-test-server")
        .enable_all()
        .build()
        .expect("a runtime can be started");
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener).expect("the socket is nonblocking");
        loop {
            let stream = tokio::select! {
                _ = &mut stopped => return,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    // The client has gone again, or descriptors ran out for a moment.
                    Err(_) => {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                        continue;
                    }
                },
            };
            // Without it a small reply on a kept connection waits 40 ms for an acknowledgement.
            let _ = stream.set_nodelay(true);
            let state = Arc::clone(&state);
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let state = Arc::clone(&state);
                    async move { state.answer(request).await }
                });
                // Errors here are the connections that clients and faults close.
                let _ = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    // Stalled replies do not keep a test from ending.
    runtime.shutdown_background();
}
