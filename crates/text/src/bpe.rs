use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

use spate_types::TokenId;

use crate::TextError;
use crate::vocab::{ByteAlphabet, Kind, Vocab, VocabSpec};

/// No token, no merge, no neighbour.
const NONE: u32 = u32::MAX;

/// Byte-level byte-pair encoding (Sennrich et al. 2016; on bytes, Radford et al. 2019).
///
/// A word starts as its bytes; the adjacent pair whose merge comes first in the list is merged, the
/// leftmost among equals, until no pair is in the list. O(n log n) for a word of n bytes, so a
/// single word of ten million bytes costs no more a byte than a page of prose.
pub(crate) struct Bpe {
    byte_tokens: [TokenId; 256],
    /// (left, right) to the merge's rank.
    ranks: HashMap<u64, u32, BuildHasherDefault<PairHasher>>,
    /// The token that a merge makes, by rank.
    merged: Vec<TokenId>,
    /// Ids of normal tokens sorted by their bytes, when a word that is a token skips the merges.
    whole_words: Option<Vec<TokenId>>,
}

impl Bpe {
    pub(crate) fn new(
        spec: &VocabSpec,
        vocab: &Vocab,
        ignore_merges: bool,
    ) -> Result<Self, TextError> {
        let ids: HashMap<&str, TokenId> = (0..)
            .zip(&spec.tokens)
            .map(|(id, text)| (text.as_str(), id))
            .collect();
        let mut byte_tokens = [NONE; 256];
        for (byte, token) in (0..=255).zip(&mut byte_tokens) {
            let text = ByteAlphabet::char_of(byte);
            if let Some(&id) = ids.get(text.encode_utf8(&mut [0; 4]) as &str) {
                *token = id;
            }
        }
        let mut ranks = HashMap::with_capacity_and_hasher(spec.merges.len(), Default::default());
        let mut merged = Vec::with_capacity(spec.merges.len());
        let mut text = String::new();
        for (rank, merge) in (0..NONE).zip(&spec.merges) {
            let refuse = |why| TextError::Vocab(format!("merge {rank} ({merge:?}): {why}"));
            let (left, right) = merge
                .split_once(' ')
                .ok_or_else(|| refuse("is not two tokens with a space between"))?;
            text.clear();
            text.push_str(left);
            text.push_str(right);
            let id = |text: &str| ids.get(text).copied();
            let (Some(l), Some(r), Some(m)) = (id(left), id(right), id(&text)) else {
                return Err(refuse("names a token that is not in the vocabulary"));
            };
            ranks.entry(pair(l, r)).or_insert(rank);
            merged.push(m);
        }
        let whole_words = ignore_merges.then(|| {
            let mut words: Vec<TokenId> = vocab.ids_of(Kind::Normal).collect();
            words.sort_unstable_by_key(|&id| vocab.bytes(id));
            words
        });
        Ok(Self {
            byte_tokens,
            ranks,
            merged,
            whole_words,
        })
    }

    /// Appends the tokens of one word. Bytes that the vocabulary has no token for are left out, as
    /// `tokenizers` and llama.cpp do (they are control characters and unassigned planes in
    /// practice).
    ///
    /// The word is shorter than 2^32 bytes.
    pub(crate) fn encode_word(
        &self,
        word: &[u8],
        vocab: &Vocab,
        scratch: &mut Scratch,
        out: &mut Vec<TokenId>,
    ) {
        if let Some(words) = &self.whole_words
            && let Ok(i) = words.binary_search_by_key(&word, |&id| vocab.bytes(id))
        {
            out.push(words[i]);
            return;
        }
        self.start(word, scratch);
        self.merge(scratch);
        let live = scratch.symbols.iter().filter(|s| s.token != NONE);
        out.extend(live.map(|s| s.token));
    }

    /// One symbol a byte, and each adjacent pair's merge in the queue.
    fn start(&self, word: &[u8], scratch: &mut Scratch) {
        let symbols = &mut scratch.symbols;
        symbols.clear();
        let tokens = word.iter().map(|&b| self.byte_tokens[usize::from(b)]);
        for (i, token) in (0..).zip(tokens.filter(|&t| t != NONE)) {
            symbols.push(Symbol {
                token,
                prev: u32::wrapping_sub(i, 1),
                next: i + 1,
                rank: NONE,
            });
        }
        let Some(last) = symbols.last_mut() else {
            return;
        };
        last.next = NONE;
        let mut queue = std::mem::take(&mut scratch.queue).into_vec();
        queue.clear();
        for i in 1..symbols.len() {
            let rank = self.rank(symbols[i - 1].token, symbols[i].token);
            symbols[i - 1].rank = rank;
            if rank != NONE {
                queue.push(entry(rank, i as u32 - 1));
            }
        }
        scratch.queue = queue.into();
    }

    fn merge(&self, scratch: &mut Scratch) {
        let Scratch { symbols, queue } = scratch;
        while let Some(Reverse(top)) = queue.pop() {
            let (rank, at) = ((top >> 32) as u32, top as u32);
            // A rank names one pair, so an equal rank means that the pair is still there.
            if symbols[at as usize].rank != rank {
                continue;
            }
            let right = symbols[at as usize].next;
            let next = symbols[right as usize].next;
            symbols[right as usize].token = NONE;
            symbols[right as usize].rank = NONE;
            let left = &mut symbols[at as usize];
            left.token = self.merged[rank as usize];
            left.next = next;
            if next != NONE {
                symbols[next as usize].prev = at;
            }
            for i in [symbols[at as usize].prev, at] {
                if i == NONE {
                    continue;
                }
                let Symbol { token, next, .. } = symbols[i as usize];
                let rank = match symbols.get(next as usize) {
                    Some(right) => self.rank(token, right.token),
                    None => NONE,
                };
                symbols[i as usize].rank = rank;
                if rank != NONE {
                    queue.push(entry(rank, i));
                }
            }
        }
    }

    fn rank(&self, left: TokenId, right: TokenId) -> u32 {
        self.ranks.get(&pair(left, right)).copied().unwrap_or(NONE)
    }
}

/// Working memory of [`Bpe::encode_word`], reused from word to word.
#[derive(Default)]
pub(crate) struct Scratch {
    symbols: Vec<Symbol>,
    /// Candidate merges, the lowest rank first, then the leftmost. Entries go stale and are checked
    /// when popped.
    queue: BinaryHeap<Reverse<u64>>,
}

/// A piece of the word in a doubly linked list; its index never changes.
struct Symbol {
    /// NONE once merged into its left neighbour.
    token: TokenId,
    prev: u32,
    next: u32,
    /// Rank of the merge with the next symbol.
    rank: u32,
}

fn pair(left: TokenId, right: TokenId) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

fn entry(rank: u32, at: u32) -> Reverse<u64> {
    Reverse(u64::from(rank) << 32 | u64::from(at))
}

/// Hashes a pair of ids with one multiplication (Fibonacci hashing, Knuth vol. 3, 6.4). The table's
/// keys come from the model file alone, so nobody can aim collisions at it.
#[derive(Default)]
struct PairHasher(u64);

impl Hasher for PairHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(u64::from(b));
        }
    }

    fn write_u64(&mut self, x: u64) {
        let product = (self.0 ^ x).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // The table takes its bucket from the low bits, and the product is best in the high ones.
        self.0 = product ^ product >> 32;
    }
}
