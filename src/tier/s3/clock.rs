//! Takes the time from every reply of the server, errors and retries included.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use aws_sdk_s3::{
    config::{
        ConfigBag, Intercept, RuntimeComponents,
        interceptors::{BeforeDeserializationInterceptorContextRef, BeforeTransmitInterceptorContextRef},
    },
    error::BoxError,
};

use crate::base::clock::{ServerClock, local_millis};

/// The header `Date` has whole seconds.
const RESOLUTION_MILLIS: u64 = 1000;

/// Watches the attempts of one operation, which come one after the other.
#[derive(Debug)]
pub(super) struct ClockWatch {
    clock: Arc<ServerClock>,
    sent: AtomicU64,
}

impl ClockWatch {
    pub(super) fn new(clock: &Arc<ServerClock>) -> Self {
        Self {
            clock: Arc::clone(clock),
            sent: AtomicU64::new(local_millis()),
        }
    }
}

impl Intercept for ClockWatch {
    fn name(&self) -> &'static str {
        "ClockWatch"
    }

    fn read_before_transmit(
        &self,
        _context: &BeforeTransmitInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        self.sent.store(local_millis(), Ordering::Relaxed);
        Ok(())
    }

    fn read_after_transmit(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let date = context.response().headers().get("date");
        let time = date.and_then(|text| httpdate::parse_http_date(text).ok());
        let since = time.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
        if let Some(since) = since {
            let sent = self.sent.load(Ordering::Relaxed);
            self.clock
                .observe(sent, local_millis(), since.as_millis() as u64, RESOLUTION_MILLIS);
        }
        Ok(())
    }
}
