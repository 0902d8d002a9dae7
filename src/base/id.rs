//! Identities that are drawn once and kept: machines and stores.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Draws `N` random bytes from the kernel.
///
/// # Panics
///
/// When the kernel has no random source, without which no identity is safe.
#[must_use]
pub fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())
            .expect("getrandom(2) without flags only fails on kernels older than 3.17");
    }
    bytes
}

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident, $int:ty, $bytes:literal, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $int);

        impl $name {
            /// Draws a new identity.
            #[must_use]
            pub fn random() -> Self {
                Self(<$int>::from_be_bytes(random_bytes::<$bytes>()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:0width$x}", self.0, width = 2 * $bytes)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                let digits = text.len() == 2 * $bytes
                    && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
                if !digits {
                    return Err(format!("{text:?} is not a {} id ({} lower-case hexadecimal digits)", $what, 2 * $bytes));
                }
                <$int>::from_str_radix(text, 16).map(Self).map_err(|err| err.to_string())
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    };
}

random_id! {
    /// One cache directory on one machine: a writer of a volume's log.
    ///
    /// Drawn when the cache directory is made, and again when it wakes up on
    /// another machine, so that two writers never share one.
    MachineId, u64, 8, "machine"
}

random_id! {
    /// One store, drawn when it is first used and kept in its `casmount.json`,
    /// so that a bucket deleted and made again is never mixed with an old cache.
    StoreId, u128, 16, "store"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_from_its_text() {
        let id = MachineId(0xab);
        assert_eq!(id.to_string(), "00000000000000ab");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!("ab".parse::<MachineId>().is_err());
        assert!("+0000000000000ab".parse::<MachineId>().is_err());
    }

    #[test]
    fn two_draws_differ() {
        assert_ne!(StoreId::random(), StoreId::random());
    }
}
