use std::sync::mpsc::Receiver;
use std::sync::{Mutex, PoisonError};

use spate_executor::{Ticket, TokenMask};

use crate::CpuError;

/// Masks on their way to the steps that wait for them.
#[derive(Debug)]
pub(crate) struct Masks {
    /// Never locked: it is here so that the threads of the pool may share what it is a part of.
    inbox: Mutex<Receiver<(Ticket, Vec<TokenMask>)>>,
    /// Those that came before their step's turn.
    early: Vec<(Ticket, Vec<TokenMask>)>,
}

impl Masks {
    pub(crate) fn new(inbox: Receiver<(Ticket, Vec<TokenMask>)>) -> Self {
        Self {
            inbox: Mutex::new(inbox),
            early: Vec::new(),
        }
    }

    /// Waits for a step's masks.
    pub(crate) fn of(&mut self, step: Ticket) -> Result<Vec<TokenMask>, CpuError> {
        if let Some(at) = self.early.iter().position(|(ticket, _)| *ticket == step) {
            return Ok(self.early.swap_remove(at).1);
        }
        let inbox = self.inbox.get_mut();
        let inbox = inbox.unwrap_or_else(PoisonError::into_inner);
        loop {
            let (ticket, masks) = inbox.recv().map_err(|_| CpuError::Ended)?;
            if ticket == step {
                return Ok(masks);
            }
            self.early.push((ticket, masks));
        }
    }
}
