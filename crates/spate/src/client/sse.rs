//! Server-sent events, as far as OpenAI servers use them: `data` lines that end in LF or CRLF. Other
//! fields and comments (pings) are skipped.

use super::ClientError;

/// An event longer than this is refused: no server sends such.
const MAX_EVENT_BYTES: usize = 16 << 20;

/// Cuts a byte stream into events. Its buffers are reused, so an event costs no allocation.
#[derive(Debug, Default)]
pub(super) struct SseParser {
    buffer: Vec<u8>,
    /// Where in `buffer` the current line begins.
    line_start: usize,
    /// No line ends in `buffer` before here.
    scanned: usize,
    /// The current event: its `data` lines so far, joined by LF.
    data: Vec<u8>,
    has_data: bool,
    is_complete: bool,
}

impl SseParser {
    /// Takes bytes as they came from the network, cut anywhere.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        self.buffer.drain(..self.line_start);
        self.scanned -= self.line_start;
        self.line_start = 0;
        if self.buffer.len() + self.data.len() + bytes.len() > MAX_EVENT_BYTES {
            let message = format!("an event of more than {MAX_EVENT_BYTES} bytes");
            return Err(ClientError::Malformed(message));
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// Moves on to the next event; false when more bytes are needed for it.
    pub(super) fn advance(&mut self) -> bool {
        if self.is_complete {
            self.data.clear();
            self.has_data = false;
            self.is_complete = false;
        }
        while let Some(offset) = self.buffer[self.scanned..].iter().position(|&b| b == b'\n') {
            let end = self.scanned + offset;
            let line = &self.buffer[self.line_start..end];
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            self.line_start = end + 1;
            self.scanned = end + 1;
            if let Some(value) = line.strip_prefix(b"data:") {
                if self.has_data {
                    self.data.push(b'\n');
                }
                self.data
                    .extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
                self.has_data = true;
            } else if line.is_empty() && self.has_data {
                self.is_complete = true;
                return true;
            }
        }
        self.scanned = self.buffer.len();
        false
    }

    /// The data of the event that `advance` came to.
    pub(super) fn data(&self) -> &[u8] {
        &self.data
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const STREAM: &[u8] = b": ping\r\n\r\ndata: {\"a\":\"\xc3\xa9\"}\n\nevent: x\r\ndata:1\r\n\
                            data: 2\r\n\r\n\n: ping\n\ndata:\n\ndata: [DONE]\n\ndata: cut off";
    const EVENTS: [&[u8]; 4] = [b"{\"a\":\"\xc3\xa9\"}", b"1\n2", b"", b"[DONE]"];

    fn events<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Vec<u8>> {
        let mut parser = SseParser::default();
        let mut events = Vec::new();
        for piece in pieces {
            parser.push(piece).unwrap();
            while parser.advance() {
                events.push(parser.data().to_vec());
            }
        }
        events
    }

    #[test]
    fn events_are_the_same_wherever_the_stream_is_cut() {
        for cut in 0..=STREAM.len() {
            let (front, back) = STREAM.split_at(cut);
            assert_eq!(events([front, back]), EVENTS, "cut at {cut}");
        }
        for size in 1..=STREAM.len() {
            assert_eq!(events(STREAM.chunks(size)), EVENTS, "pieces of {size}");
        }
    }

    #[test]
    fn an_endless_event_is_refused() {
        let endless_line = vec![b'x'; 1 << 20];
        let mut endless_lines = b"data: ".to_vec();
        endless_lines.resize((1 << 20) - 1, b'x');
        endless_lines.push(b'\n');
        for piece in [endless_line, endless_lines] {
            let mut parser = SseParser::default();
            let refused = (0..32).find(|_| {
                let result = parser.push(&piece);
                assert!(!parser.advance());
                result.is_err()
            });
            assert_eq!(refused, Some(16));
        }
    }
}
