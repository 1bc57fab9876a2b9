//! Server-sent events, as far as OpenAI servers use them: `data` lines, comments ignored.

/// Cuts a byte stream into events.
#[derive(Debug, Default)]
pub(crate) struct SseParser {
    buffer: Vec<u8>,
    /// Bytes at the front of `buffer` that were given out.
    consumed: usize,
    data: Option<String>,
}

/// An event, or a line of one, longer than this is refused: no server sends such.
const MAX_EVENT_BYTES: usize = 16 << 20;

impl SseParser {
    /// Takes bytes as they came from the network, cut anywhere.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<(), &'static str> {
        self.buffer.drain(..self.consumed);
        self.consumed = 0;
        if self.buffer.len() + bytes.len() > MAX_EVENT_BYTES {
            return Err("the server sent an endless event");
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// The data of the next complete event.
    pub(crate) fn next_event(&mut self) -> Option<String> {
        loop {
            let rest = &self.buffer[self.consumed..];
            let end = rest.iter().position(|&byte| byte == b'\n')?;
            let line = String::from_utf8_lossy(&rest[..end]);
            let line = line.strip_suffix('\r').unwrap_or(&line);
            if let Some(value) = line.strip_prefix("data:") {
                let value = value.strip_prefix(' ').unwrap_or(value);
                match &mut self.data {
                    Some(data) => {
                        data.push('\n');
                        data.push_str(value);
                    }
                    None => self.data = Some(value.to_owned()),
                }
            }
            let is_end = line.is_empty();
            self.consumed += end + 1;
            if is_end && self.data.is_some() {
                return self.data.take();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn events_are_the_same_wherever_the_stream_is_cut() {
        let stream = b": ping\r\n\r\ndata: {\"a\":\"\xc3\xa9\"}\n\nevent: x\ndata:1\ndata: 2\n\n\ndata: [DONE]\n\n";
        for size in 1..=stream.len() {
            let mut parser = SseParser::default();
            let mut events = Vec::new();
            for piece in stream.chunks(size) {
                parser.push(piece).unwrap();
                events.extend(std::iter::from_fn(|| parser.next_event()));
            }
            assert_eq!(events, ["{\"a\":\"é\"}", "1\n2", "[DONE]"], "pieces of {size}");
        }
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut parser = SseParser::default();
        let piece = vec![b'x'; 1 << 20];
        let refused = (0..32).find(|_| {
            let result = parser.push(&piece);
            assert_eq!(parser.next_event(), None);
            result.is_err()
        });
        assert_eq!(refused, Some(16));
    }
}
