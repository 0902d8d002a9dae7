//! The set of what is in use: eight bytes for each object, see [`crate::tier::sweeping::mark`].

/// Marks are sorted when so many have come, at the latest.
const MIN_FRESH: usize = 1 << 20;

/// A set of marks that grows, and is then asked.
#[derive(Debug, Default)]
pub struct Marks {
    /// Ascending, each once.
    sorted: Vec<u64>,
    fresh: Vec<u64>,
}

impl Marks {
    pub fn add(&mut self, mark: u64) {
        self.fresh.push(mark);
        if self.fresh.len() >= MIN_FRESH.max(self.sorted.len()) {
            self.sort();
        }
    }

    /// Must be called between the last [`Self::add`] and the first [`Self::has`].
    pub fn sort(&mut self) {
        self.sorted.append(&mut self.fresh);
        self.sorted.sort_unstable();
        self.sorted.dedup();
    }

    pub fn has(&self, mark: u64) -> bool {
        debug_assert!(self.fresh.is_empty(), "asked before it was sorted");
        self.sorted.binary_search(&mark).is_ok()
    }
}
