//! Large buffers that are used again.
//!
//! A fresh megabyte costs its 256 page faults, and giving it back to the kernel an
//! interrupt of the other CPUs: in a profile of a cold sequential read that was a
//! fifth of the daemon's time. So buffers of chunks come from a small store of used ones.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

/// Buffers kept, of at most [`MAX_KEPT_BYTES`] each.
const MAX_KEPT: usize = 16;

/// The longest chunk, see [`super::chunk`].
const MAX_KEPT_BYTES: usize = 4 << 20;

/// Smaller ones are left to the allocator, which is quick at them.
const MIN_BYTES: usize = 64 << 10;

static KEPT: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// An empty buffer with room for `capacity` bytes.
#[must_use]
pub fn take(capacity: usize) -> Vec<u8> {
    if (MIN_BYTES..=MAX_KEPT_BYTES).contains(&capacity) {
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = kept.iter().rposition(|buffer| buffer.capacity() >= capacity) {
            return kept.swap_remove(place);
        }
    }
    Vec::with_capacity(capacity)
}

/// Shares a buffer from [`take`]; it is kept for the next one when the last reference goes.
#[must_use]
pub fn share(buffer: Vec<u8>) -> Bytes {
    if buffer.capacity() < MIN_BYTES {
        return buffer.into();
    }
    Bytes::from_owner(Lent(buffer))
}

struct Lent(Vec<u8>);

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut buffer = std::mem::take(&mut self.0);
        if buffer.capacity() > MAX_KEPT_BYTES {
            return;
        }
        buffer.clear();
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < MAX_KEPT {
            kept.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_empty_when_the_last_reference_is_gone() {
        // Larger than what other tests of this process take.
        let mut buffer = take(MAX_KEPT_BYTES);
        let place = buffer.as_ptr();
        buffer.extend_from_slice(b"bytes");
        let shared = share(buffer);
        let part = shared.slice(1..3);
        drop(shared);
        assert_eq!(&part[..], b"yt");
        let other = take(MAX_KEPT_BYTES);
        assert_ne!(other.as_ptr(), place, "it is still read");
        drop(part);
        let again = take(MAX_KEPT_BYTES);
        assert!(again.as_ptr() == place && again.is_empty());
    }

    #[test]
    fn no_more_is_kept_than_allowed() {
        let all: Vec<_> = (0..2 * MAX_KEPT).map(|_| share(take(MIN_BYTES))).collect();
        drop(all);
        drop(share(take(MAX_KEPT_BYTES + 1)));
        let kept = KEPT.lock().unwrap();
        assert!(kept.len() <= MAX_KEPT);
        assert!(kept.iter().all(|buffer| buffer.capacity() <= MAX_KEPT_BYTES));
    }
}
