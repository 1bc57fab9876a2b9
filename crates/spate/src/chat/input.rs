//! What is typed: messages of one or more lines, and commands.

/// Something complete to act on.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Input {
    Message(String),
    /// New instructions; `None` removes them.
    System(Option<String>),
    Reset,
    Help,
    Exit,
    /// A command that does not exist.
    Unknown(String),
}

const QUOTES: &str = "\"\"\"";

/// Puts lines together: a trailing backslash joins the next line, and `"""` opens a block that the
/// next `"""` at the end of a line closes. Commands are single lines outside of both.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    lines: Vec<String>,
    in_block: bool,
}

impl Assembler {
    /// Whether the next line continues a message.
    pub(super) fn is_open(&self) -> bool {
        self.in_block || !self.lines.is_empty()
    }

    /// Takes a line without its end; gives the input that it completes.
    pub(super) fn push(&mut self, line: &str) -> Option<Input> {
        let line = line.strip_suffix('\r').unwrap_or(line);
        if self.in_block {
            return self.push_in_block(line);
        }
        if !self.is_open() {
            if let Some(first) = line.trim_start().strip_prefix(QUOTES) {
                self.in_block = true;
                return match first.is_empty() {
                    true => None,
                    false => self.push_in_block(first),
                };
            }
            if line.starts_with('/') {
                return Some(command(line));
            }
        }
        if let Some(line) = line.strip_suffix('\\') {
            self.lines.push(line.to_owned());
            return None;
        }
        self.lines.push(line.to_owned());
        self.finish()
    }

    fn push_in_block(&mut self, line: &str) -> Option<Input> {
        let Some(last) = line.trim_end().strip_suffix(QUOTES) else {
            self.lines.push(line.to_owned());
            return None;
        };
        if !last.is_empty() {
            self.lines.push(last.to_owned());
        }
        self.finish()
    }

    /// The message so far, at the end of input; `None` if it has no text.
    pub(super) fn finish(&mut self) -> Option<Input> {
        self.in_block = false;
        let text = std::mem::take(&mut self.lines).join("\n");
        (!text.trim().is_empty()).then_some(Input::Message(text))
    }
}

fn command(line: &str) -> Input {
    let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    match name {
        "/exit" | "/quit" => Input::Exit,
        "/reset" => Input::Reset,
        "/help" => Input::Help,
        "/system" => Input::System(Some(rest.trim().to_owned()).filter(|text| !text.is_empty())),
        _ => Input::Unknown(name.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn read(text: &str) -> Vec<Input> {
        let mut assembler = Assembler::default();
        let mut inputs: Vec<Input> = text
            .lines()
            .filter_map(|line| assembler.push(line))
            .collect();
        inputs.extend(assembler.finish());
        assert!(!assembler.is_open());
        inputs
    }

    fn message(text: &str) -> Input {
        Input::Message(text.to_owned())
    }

    #[test]
    fn messages_of_one_line_and_more() {
        assert_eq!(read("hi\n\n  \nyou\r\n"), [message("hi"), message("you")]);
        assert_eq!(read("a\\\nb\\\n/c\nd"), [message("a\nb\n/c"), message("d")]);
        assert_eq!(
            read("\"\"\"\na\\\n\n/exit\nb\n\"\"\"\nc"),
            [message("a\\\n\n/exit\nb"), message("c")]
        );
        assert_eq!(read("\"\"\"a\nb\"\"\""), [message("a\nb")]);
        assert_eq!(
            read("\"\"\"one line\"\"\"\n\"\"\"\"\"\"\nnext"),
            [message("one line"), message("next")]
        );
    }

    #[test]
    fn the_end_of_input_ends_a_message() {
        assert_eq!(read("a\\"), [message("a")]);
        assert_eq!(read("\"\"\"\na\nb"), [message("a\nb")]);
        assert_eq!(read("\"\"\""), []);
    }

    #[test]
    fn commands() {
        let text = "/system  be brief \n/system\n/reset\n/help\n/exit\n/quit\n/bye now\nno /exit";
        let expected = [
            Input::System(Some("be brief".into())),
            Input::System(None),
            Input::Reset,
            Input::Help,
            Input::Exit,
            Input::Exit,
            Input::Unknown("/bye".into()),
            message("no /exit"),
        ];
        assert_eq!(read(text), expected);
    }
}
