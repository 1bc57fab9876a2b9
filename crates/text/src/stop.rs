use std::sync::Arc;

/// Looks for stop strings in one sequence's text as it comes.
///
/// The match that ends first wins; among those that end together, the longest. Text that could be
/// the start of a stop string is held back until that is decided. Time is linear in the text
/// (Aho and Corasick 1975), whatever the stop strings.
#[derive(Clone)]
pub struct StopMatcher {
    automaton: Arc<Automaton>,
    include_stop: bool,
    state: usize,
    /// Not yet given out: between pushes, the longest end of the text that begins a stop string.
    held: String,
    stopped: bool,
}

/// What a push gives.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Matched {
    /// Text to show now.
    pub emit: String,
    /// The stop string that ended the sequence. Later pushes give nothing.
    pub stop: Option<String>,
}

impl StopMatcher {
    /// Empty stop strings never match. `include_stop` shows the stop string itself too.
    ///
    /// A clone shares the automaton: make one matcher a request, clone it for each sequence.
    pub fn new(stops: Vec<String>, include_stop: bool) -> Self {
        Self {
            automaton: Arc::new(Automaton::new(stops)),
            include_stop,
            state: ROOT,
            held: String::new(),
            stopped: false,
        }
    }

    /// The next piece of text.
    pub fn push(&mut self, text: &str) -> Matched {
        if self.stopped {
            return Matched::default();
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (i, byte) in text.bytes().enumerate() {
            self.state = self.automaton.step(self.state, byte);
            if let Some(stop) = self.automaton.matched(self.state) {
                self.stopped = true;
                let end = before + i + 1;
                let shown = if self.include_stop {
                    end
                } else {
                    end - stop.len()
                };
                self.held.truncate(shown);
                return Matched {
                    emit: std::mem::take(&mut self.held),
                    stop: Some(stop.to_owned()),
                };
            }
        }
        let undecided = self.held.len() - self.automaton.nodes[self.state].depth;
        let rest = self.held.split_off(undecided);
        Matched {
            emit: std::mem::replace(&mut self.held, rest),
            stop: None,
        }
    }

    /// The end of the sequence: what was held back.
    pub fn flush(&mut self) -> String {
        self.state = ROOT;
        std::mem::take(&mut self.held)
    }
}

const ROOT: usize = 0;

/// A trie of the stop strings with failure links.
struct Automaton {
    stops: Vec<String>,
    nodes: Vec<Node>,
}

#[derive(Default)]
struct Node {
    /// Bytes from the root.
    depth: usize,
    children: Vec<(u8, usize)>,
    /// The node of the longest proper suffix that is in the trie.
    fail: usize,
    /// The longest stop string that is a suffix of this node's string.
    stop: Option<usize>,
}

impl Automaton {
    fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|s| !s.is_empty());
        let mut automaton = Self {
            stops: Vec::new(),
            nodes: vec![Node::default()],
        };
        for (i, stop) in stops.iter().enumerate() {
            let mut node = ROOT;
            for byte in stop.bytes() {
                node = match automaton.child(node, byte) {
                    Some(child) => child,
                    None => automaton.add_child(node, byte),
                };
            }
            automaton.nodes[node].stop = Some(i);
        }
        automaton.stops = stops;
        automaton.link();
        automaton
    }

    fn add_child(&mut self, parent: usize, byte: u8) -> usize {
        let child = self.nodes.len();
        self.nodes.push(Node {
            depth: self.nodes[parent].depth + 1,
            ..Node::default()
        });
        self.nodes[parent].children.push((byte, child));
        child
    }

    /// Sets the failure links, breadth first: a node's link needs those of all shallower nodes.
    fn link(&mut self) {
        let mut queue = vec![ROOT];
        let mut head = 0;
        while head < queue.len() {
            let node = queue[head];
            head += 1;
            for (byte, child) in self.nodes[node].children.clone() {
                if node != ROOT {
                    let fail = self.step(self.nodes[node].fail, byte);
                    self.nodes[child].fail = fail;
                    let inherited = self.nodes[fail].stop;
                    self.nodes[child].stop = self.nodes[child].stop.or(inherited);
                }
                queue.push(child);
            }
        }
    }

    fn child(&self, node: usize, byte: u8) -> Option<usize> {
        let children = &self.nodes[node].children;
        children.iter().find(|c| c.0 == byte).map(|c| c.1)
    }

    fn step(&self, mut node: usize, byte: u8) -> usize {
        loop {
            if let Some(child) = self.child(node, byte) {
                return child;
            }
            if node == ROOT {
                return ROOT;
            }
            node = self.nodes[node].fail;
        }
    }

    fn matched(&self, node: usize) -> Option<&str> {
        self.nodes[node].stop.map(|i| self.stops[i].as_str())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Tries every end, then every stop string: the definition, spelled out.
    fn naive(text: &str, stops: &[String], include: bool) -> (String, Option<String>) {
        for end in 1..=text.len() {
            let ends_here =
                |s: &&String| !s.is_empty() && text.as_bytes()[..end].ends_with(s.as_bytes());
            if let Some(stop) = stops.iter().filter(ends_here).max_by_key(|s| s.len()) {
                let shown = if include { end } else { end - stop.len() };
                return (text[..shown].into(), Some(stop.clone()));
            }
        }
        (text.into(), None)
    }

    /// Pushes `text` in the given pieces; checks that nothing is held that can't begin a stop.
    fn run(pieces: &[String], stops: &[String], include: bool) -> (String, Option<String>) {
        let mut matcher = StopMatcher::new(stops.to_vec(), include);
        let (mut shown, mut seen, mut stop) = (String::new(), String::new(), None);
        for piece in pieces {
            let matched = matcher.push(piece);
            shown.push_str(&matched.emit);
            seen.push_str(piece);
            if stop.is_some() {
                assert_eq!(matched, Matched::default(), "nothing comes after a stop");
            } else if matched.stop.is_none() {
                let held = &seen[shown.len()..];
                assert!(held.is_empty() || stops.iter().any(|s| s.starts_with(held)));
            }
            stop = stop.or(matched.stop);
        }
        shown.push_str(&matcher.flush());
        (shown, stop)
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(
            pieces in prop::collection::vec("[abé]{0,5}", 0..8),
            stops in prop::collection::vec("[abé]{0,4}", 0..5),
            include: bool,
        ) {
            let text = pieces.concat();
            prop_assert_eq!(run(&pieces, &stops, include), naive(&text, &stops, include));
        }
    }

    #[test]
    fn holds_back_and_releases() {
        let mut matcher = StopMatcher::new(vec!["\n\nUser:".into()], false);
        assert_eq!(matcher.push("Hi\n").emit, "Hi");
        assert_eq!(matcher.push("\n").emit, "");
        assert_eq!(matcher.push("\nUs").emit, "\n");
        assert_eq!(matcher.push("ed").emit, "\n\nUsed");
        assert_eq!(matcher.push(" it.\n\nUse").emit, " it.");
        let last = matcher.push("r: more");
        assert_eq!(
            last,
            Matched {
                emit: String::new(),
                stop: Some("\n\nUser:".into())
            }
        );
        assert_eq!(matcher.flush(), "");
    }

    #[test]
    fn a_long_near_miss_is_linear() {
        let stop = format!("{}b", "a".repeat(5_000));
        let mut matcher = StopMatcher::new(vec![stop], false);
        let text = "a".repeat(1_000_000);
        let start = std::time::Instant::now();
        let mut shown = matcher.push(&text).emit;
        shown.push_str(&matcher.flush());
        assert_eq!(shown.len(), text.len());
        assert!(start.elapsed().as_secs() < 2, "{:?}", start.elapsed());
    }
}
