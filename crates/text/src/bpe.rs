use std::cmp::Reverse;
use std::collections::BinaryHeap;

use spate_types::TokenId;

use crate::TextError;
use crate::hash::FileHashMap;
use crate::vocab::{Ids, Kind};

/// No token, no merge, no neighbour.
const NONE: u32 = u32::MAX;

/// Longest token of a scored vocabulary, in bytes. Each way to cut a token in two is looked up, so
/// this bounds the work of loading one.
const MAX_SCORED_TOKEN: usize = 1024;

/// The merges of byte-pair encoding (Sennrich et al. 2016).
///
/// A word starts as its smallest tokens; the adjacent pair whose merge comes first is merged, the
/// leftmost among equals, until no pair has a merge. O(n log n) for a word of n tokens, so a
/// single word of ten million bytes costs no more a byte than a page of prose.
pub(crate) struct Bpe {
    merges: FileHashMap<u64, Merge>,
}

/// What becomes of a pair.
#[derive(Clone, Copy)]
struct Merge {
    /// The lowest goes first.
    rank: u32,
    into: TokenId,
}

const NO_MERGE: Merge = Merge {
    rank: NONE,
    into: NONE,
};

impl Bpe {
    /// Of a list of merges, the most urgent first.
    pub(crate) fn listed<'m>(
        merges: impl ExactSizeIterator<Item = Result<(&'m str, &'m str), TextError>>,
        ids: &Ids,
    ) -> Result<Self, TextError> {
        let mut table = FileHashMap::with_capacity_and_hasher(merges.len(), Default::default());
        let mut text = String::new();
        for (rank, merge) in (0..NONE).zip(merges) {
            let (left, right) = merge?;
            text.clear();
            text.push_str(left);
            text.push_str(right);
            let id = |text: &str| ids.get(text).copied();
            let (Some(l), Some(r), Some(into)) = (id(left), id(right), id(&text)) else {
                return Err(TextError::Vocab(format!(
                    "merge {rank} (\"{left} {right}\"): names a token that is not in the vocabulary"
                )));
            };
            table.entry(pair(l, r)).or_insert(Merge { rank, into });
        }
        Ok(Self { merges: table })
    }

    /// Of a vocabulary with scores, as SentencePiece has it: two normal tokens merge if their texts
    /// together are one, the highest score first.
    pub(crate) fn scored(
        tokens: &[String],
        kinds: &[Kind],
        scores: &[f32],
        ids: &Ids,
    ) -> Result<Self, TextError> {
        let ranks = ranks_of(scores)?;
        let normal = |text: &str| {
            let id = ids.get(text).copied();
            id.filter(|&id| kinds[id as usize] == Kind::Normal)
        };
        // Most tokens can be made in one way or two.
        let mut table = FileHashMap::with_capacity_and_hasher(2 * tokens.len(), Default::default());
        for (into, text) in (0..).zip(tokens) {
            // Of tokens with the same text, the one that the text leads to.
            if normal(text) != Some(into) {
                continue;
            }
            if text.len() > MAX_SCORED_TOKEN {
                return Err(TextError::Vocab(format!(
                    "token {into} is {} bytes long; at most {MAX_SCORED_TOKEN} are supported",
                    text.len()
                )));
            }
            let rank = ranks[into as usize];
            for (at, _) in text.char_indices().skip(1) {
                let (left, right) = text.split_at(at);
                let Some(left) = normal(left) else { continue };
                let Some(right) = normal(right) else { continue };
                table.insert(pair(left, right), Merge { rank, into });
            }
        }
        Ok(Self { merges: table })
    }

    /// Each pair that merges.
    pub(crate) fn pairs(&self) -> impl Iterator<Item = (TokenId, TokenId)> + '_ {
        self.merges
            .keys()
            .map(|&key| ((key >> 32) as u32, key as u32))
    }

    /// Appends the tokens of one word that starts as `tokens`, of which there are fewer than 2^32.
    pub(crate) fn encode_word(
        &self,
        tokens: impl Iterator<Item = TokenId>,
        scratch: &mut Scratch,
        out: &mut Vec<TokenId>,
    ) {
        self.start(tokens, scratch);
        self.merge(scratch);
        let live = scratch.symbols.iter().filter(|s| s.token != NONE);
        out.extend(live.map(|s| s.token));
    }

    /// One symbol a token, and each adjacent pair's merge in the queue.
    fn start(&self, tokens: impl Iterator<Item = TokenId>, scratch: &mut Scratch) {
        let symbols = &mut scratch.symbols;
        symbols.clear();
        symbols.extend((0..).zip(tokens).map(|(i, token)| Symbol {
            token,
            prev: u32::wrapping_sub(i, 1),
            next: i + 1,
            merge: NO_MERGE,
        }));
        let Some(last) = symbols.last_mut() else {
            return;
        };
        last.next = NONE;
        let mut queue = std::mem::take(&mut scratch.queue).into_vec();
        queue.clear();
        for i in 1..symbols.len() {
            let merge = self.merge_of(symbols[i - 1].token, symbols[i].token);
            symbols[i - 1].merge = merge;
            if merge.rank != NONE {
                queue.push(entry(merge.rank, i as u32 - 1));
            }
        }
        scratch.queue = queue.into();
    }

    fn merge(&self, scratch: &mut Scratch) {
        let Scratch { symbols, queue } = scratch;
        while let Some(Reverse(top)) = queue.pop() {
            let (rank, at) = ((top >> 32) as u32, top as u32);
            // A stale entry. If the place has another pair of this rank by now, this entry is as
            // good as that pair's own, which is stale afterwards.
            if symbols[at as usize].merge.rank != rank {
                continue;
            }
            let right = symbols[at as usize].next;
            let next = symbols[right as usize].next;
            symbols[right as usize].token = NONE;
            symbols[right as usize].merge = NO_MERGE;
            let left = &mut symbols[at as usize];
            left.token = left.merge.into;
            left.next = next;
            if next != NONE {
                symbols[next as usize].prev = at;
            }
            for i in [symbols[at as usize].prev, at] {
                if i == NONE {
                    continue;
                }
                let Symbol { token, next, .. } = symbols[i as usize];
                let merge = match symbols.get(next as usize) {
                    Some(right) => self.merge_of(token, right.token),
                    None => NO_MERGE,
                };
                symbols[i as usize].merge = merge;
                if merge.rank != NONE {
                    queue.push(entry(merge.rank, i));
                }
            }
        }
    }

    fn merge_of(&self, left: TokenId, right: TokenId) -> Merge {
        let merge = self.merges.get(&pair(left, right));
        merge.copied().unwrap_or(NO_MERGE)
    }
}

/// The place of each score among the distinct ones, the highest first.
fn ranks_of(scores: &[f32]) -> Result<Vec<u32>, TextError> {
    if let Some(id) = scores.iter().position(|s| s.is_nan()) {
        return Err(TextError::Vocab(format!("the score of token {id} is NaN")));
    }
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_unstable_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let mut ranks = vec![0; scores.len()];
    for i in 1..order.len() {
        let (before, this) = (order[i - 1], order[i]);
        let step = u32::from(scores[before] != scores[this]);
        ranks[this] = ranks[before] + step;
    }
    Ok(ranks)
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
#[derive(Clone, Copy)]
struct Symbol {
    /// NONE once merged into its left neighbour.
    token: TokenId,
    prev: u32,
    next: u32,
    /// With the next symbol.
    merge: Merge,
}

fn pair(left: TokenId, right: TokenId) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

fn entry(rank: u32, at: u32) -> Reverse<u64> {
    Reverse(u64::from(rank) << 32 | u64::from(at))
}
