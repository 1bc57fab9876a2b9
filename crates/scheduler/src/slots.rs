use spate_types::Slot;

/// The executor's slots.
///
/// A slot whose sequence ended is *released*: either the executor is told, or the next sequence
/// takes it before that happened — its bind resets whatever the slot held.
#[derive(Debug)]
pub(crate) struct Slots {
    total: u32,
    free: Vec<Slot>,
    released: Vec<Slot>,
}

impl Slots {
    pub(crate) fn new(total: u32) -> Self {
        Self {
            total,
            free: (0..total).rev().map(Slot).collect(),
            released: Vec::new(),
        }
    }

    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.released.len()
    }

    pub(crate) fn take(&mut self) -> Option<Slot> {
        self.free.pop().or_else(|| self.released.pop())
    }

    pub(crate) fn release(&mut self, slot: Slot) {
        self.released.push(slot);
    }

    /// The released slots, which are then free.
    pub(crate) fn take_released(&mut self) -> Vec<Slot> {
        self.free.extend_from_slice(&self.released);
        std::mem::take(&mut self.released)
    }

    pub(crate) fn check_invariants(&self, taken: impl IntoIterator<Item = Slot>) {
        let mut seen = vec![false; self.total as usize];
        for slot in taken
            .into_iter()
            .chain(self.free.iter().chain(&self.released).copied())
        {
            let doubled = std::mem::replace(&mut seen[slot.0 as usize], true);
            assert!(
                !doubled,
                "slot {} is taken twice, or taken and free",
                slot.0
            );
        }
        assert!(seen.iter().all(|&s| s), "a slot is neither free nor taken");
    }
}
