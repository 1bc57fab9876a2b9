//! The pure scheduling state machine: which sequence computes which tokens in the next step.
