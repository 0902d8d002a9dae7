//! The body of a reply, counted, and spoiled where a fault says so.

use std::{
    io,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame, SizeHint};

use super::faults::Traffic;

/// What happens to a body on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spoil {
    /// One bit is turned.
    Flip,
    /// The connection is closed after this many bytes.
    CutAfter(u64),
    /// Nothing comes after this many bytes.
    StallAfter(u64),
}

/// A body on its way to the client.
pub(super) struct ReplyBody {
    pub(super) inner: s3s::Body,
    pub(super) spoil: Option<Spoil>,
    pub(super) passed: u64,
    pub(super) rest: Option<Bytes>,
    pub(super) traffic: Arc<Traffic>,
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let left = match self.spoil {
            Some(Spoil::CutAfter(limit)) if self.passed >= limit => {
                return Poll::Ready(Some(Err(io::ErrorKind::ConnectionReset.into())));
            }
            // Never woken: the client gives up, and closing its end drops this body.
            Some(Spoil::StallAfter(limit)) if self.passed >= limit => return Poll::Pending,
            Some(Spoil::CutAfter(limit) | Spoil::StallAfter(limit)) => limit - self.passed,
            Some(Spoil::Flip) | None => u64::MAX,
        };
        let piece = match self.rest.take() {
            Some(rest) => rest,
            None => match Pin::new(&mut self.inner).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => data,
                    Err(other) => return Poll::Ready(Some(Ok(other))),
                },
                Poll::Ready(Some(Err(error))) => {
                    return Poll::Ready(Some(Err(io::Error::other(error))));
                }
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            },
        };
        let mut piece = piece;
        if piece.len() as u64 > left {
            self.rest = Some(piece.split_off(left as usize));
        }
        if self.spoil == Some(Spoil::Flip) && !piece.is_empty() {
            self.spoil = None;
            let mut bytes = BytesMut::from(&piece[..]);
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x10;
            piece = bytes.freeze();
        }
        let len = piece.len() as u64;
        self.passed += len;
        self.traffic.sent.fetch_add(len, Ordering::Relaxed);
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        let may_end = matches!(self.spoil, None | Some(Spoil::Flip));
        may_end && self.rest.is_none() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        // The announced length stays what it would be without a fault.
        self.inner.size_hint()
    }
}
