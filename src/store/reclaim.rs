//! Keeps the budget: acts on what `victims` chooses.

#[derive(Debug)]
pub struct Reclaimer {}

impl Reclaimer {
    /// Evicts until both limits hold again; called when the disk is full and by its own thread.
    pub fn run_now(&self) {
        todo!()
    }
}
