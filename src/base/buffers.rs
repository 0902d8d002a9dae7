//! Large buffers that are used again.
//!
//! A fresh megabyte costs its 256 page faults, and giving it back to the kernel an
//! interrupt of the other CPUs: in a profile of a cold sequential read that was a
//! fifth of the daemon's time. So buffers of chunks come from a small store of used ones.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

/// Buffers kept, of at most [`MAX_KEPT_BYTES`] each.
const MAX_KEPT: usize = 16;

/// A pack of chunks with its head; the longest chunk is half of it, see [`super::chunk`].
const MAX_KEPT_BYTES: usize = (4 << 20) + (64 << 10);

/// Smaller ones are left to the allocator, which is quick at them.
const MIN_BYTES: usize = 64 << 10;

static POOL: Pool = Pool::new();

/// An empty buffer with room for `capacity` bytes.
#[must_use]
pub fn take(capacity: usize) -> Vec<u8> {
    POOL.take(capacity)
}

/// Shares a buffer from [`take`]; it is kept for the next one when the last reference goes.
#[must_use]
pub fn share(buffer: Vec<u8>) -> Bytes {
    POOL.share(buffer)
}

struct Pool(Mutex<Vec<Vec<u8>>>);

impl Pool {
    const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, capacity: usize) -> Vec<u8> {
        if !(MIN_BYTES..=MAX_KEPT_BYTES).contains(&capacity) {
            return Vec::with_capacity(capacity);
        }
        let fitting = {
            let mut kept = self.kept();
            let place = kept.iter().rposition(|buffer| buffer.capacity() >= capacity);
            place.map(|place| kept.swap_remove(place))
        };
        fitting.unwrap_or_else(|| Vec::with_capacity(class(capacity)))
    }

    fn share(&'static self, buffer: Vec<u8>) -> Bytes {
        if buffer.capacity() < MIN_BYTES {
            return buffer.into();
        }
        Bytes::from_owner(Lent { buffer, pool: self })
    }

    fn keep(&self, mut buffer: Vec<u8>) {
        if buffer.capacity() > MAX_KEPT_BYTES {
            return;
        }
        buffer.clear();
        let mut kept = self.kept();
        if kept.len() < MAX_KEPT {
            kept.push(buffer);
        } else if let Some(smallest) = kept.iter_mut().min_by_key(|kept| kept.capacity())
            && smallest.capacity() < buffer.capacity()
        {
            *smallest = buffer;
        }
    }
}

/// Packs are of all lengths: a buffer that just fits one fits few others. What is not
/// written to takes no memory.
fn class(capacity: usize) -> usize {
    capacity.next_power_of_two().min(MAX_KEPT_BYTES)
}

struct Lent {
    buffer: Vec<u8>,
    pool: &'static Pool,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.pool.keep(std::mem::take(&mut self.buffer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> &'static Pool {
        Box::leak(Box::new(Pool::new()))
    }

    #[test]
    fn a_buffer_comes_back_empty_when_the_last_reference_is_gone() {
        let pool = pool();
        let mut buffer = pool.take(MAX_KEPT_BYTES);
        let place = buffer.as_ptr();
        buffer.extend_from_slice(b"bytes");
        let shared = pool.share(buffer);
        let part = shared.slice(1..3);
        drop(shared);
        assert_eq!(&part[..], b"yt");
        let other = pool.take(MAX_KEPT_BYTES);
        assert_ne!(other.as_ptr(), place, "it is still read");
        drop(part);
        let again = pool.take(MAX_KEPT_BYTES);
        assert!(again.as_ptr() == place && again.is_empty());
    }

    #[test]
    fn a_buffer_serves_for_others_of_about_its_length() {
        let pool = pool();
        let one = pool.share(pool.take(3 << 20));
        let place = one.as_ptr();
        drop(one);
        let longer = pool.take((3 << 20) + 4096);
        assert_eq!(longer.as_ptr(), place);
        assert_eq!(class(MAX_KEPT_BYTES - 1), MAX_KEPT_BYTES);
        assert_eq!(class(65 << 10), 128 << 10);
    }

    #[test]
    fn no_more_is_kept_than_allowed_and_rather_the_large_ones() {
        let pool = pool();
        let all: Vec<_> = (0..2 * MAX_KEPT)
            .map(|_| pool.share(pool.take(MIN_BYTES)))
            .collect();
        drop(all);
        drop(pool.share(pool.take(MAX_KEPT_BYTES + 1)));
        drop(pool.share(pool.take(MAX_KEPT_BYTES)));
        let kept = pool.kept();
        assert_eq!(kept.len(), MAX_KEPT);
        assert!(kept.iter().all(|buffer| buffer.capacity() <= MAX_KEPT_BYTES));
        assert!(kept.iter().any(|buffer| buffer.capacity() == MAX_KEPT_BYTES));
    }
}
