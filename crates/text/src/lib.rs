//! Text to tokens and back: tokenizer, chat template, incremental detokenizer, stop strings.
//!
//! A chat request passes [`ChatTemplate::render`], then [`Tokenizer::encode_rendered`]; its output
//! tokens pass one [`Detokenizer`] and one [`StopMatcher`] per sequence. Everything here is
//! synchronous and CPU-bound: run it on a worker, never on an I/O thread.
//!
//! Control tokens (`<|im_start|>` and the like) are recognised only in text that the template
//! wrote: see [`Rendered`].

mod bpe;
mod byte_level;
mod detokenizer;
mod error;
mod families;
mod gguf;
mod guard;
mod hash;
mod hf;
mod pretokenizer;
mod python;
mod sentencepiece;
mod stop;
mod synthetic;
mod template;
mod tokenizer;
mod vocab;
mod whole;

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod template_tests;
#[cfg(test)]
mod tokenizer_tests;

pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use gguf::VocabSpec;
pub use guard::Rendered;
pub use hf::TemplateSource;
pub use stop::{Matched, StopMatcher};
pub use template::{ChatTemplate, TemplateInput};
pub use tokenizer::Tokenizer;
