use std::fs::File;
use std::io::{BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::ModelError;

/// Reads little-endian fields in sequence and knows, at every point, how many bytes are left: no
/// length or count is believed before it has been compared with them.
pub(super) struct Reader<R = BufReader<File>> {
    file: PathBuf,
    inner: R,
    /// Offset of the next byte.
    pub(super) offset: u64,
    /// Size of the file.
    pub(super) size: u64,
}

impl Reader {
    pub(super) fn open(path: &Path) -> Result<Self, ModelError> {
        let io = |source| ModelError::Io {
            file: path.to_owned(),
            source,
        };
        let mut file = File::open(path).map_err(io)?;
        if file.metadata().map_err(io)?.is_dir() {
            return Err(io(ErrorKind::IsADirectory.into()));
        }
        let size = file.seek(SeekFrom::End(0)).map_err(io)?;
        file.rewind().map_err(io)?;
        Ok(Self {
            file: path.to_owned(),
            inner: BufReader::with_capacity(1 << 18, file),
            offset: 0,
            size,
        })
    }

    pub(super) fn into_file(self) -> File {
        self.inner.into_inner()
    }
}

impl<R: Read> Reader<R> {
    /// An error about the field that starts at `offset`.
    pub(super) fn error(&self, offset: u64, problem: impl Into<String>) -> ModelError {
        ModelError::Format {
            file: self.file.clone(),
            offset,
            problem: problem.into(),
        }
    }

    fn fill(&mut self, out: &mut [u8], what: &str) -> Result<(), ModelError> {
        let left = self.size.saturating_sub(self.offset);
        if out.len() as u64 > left {
            return Err(self.error(
                self.offset,
                format!(
                    "the file ends {left} bytes into a {what} of {} bytes; it may be cut short",
                    out.len()
                ),
            ));
        }
        match self.inner.read_exact(out) {
            Ok(()) => {
                self.offset += out.len() as u64;
                Ok(())
            }
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => {
                Err(self.error(self.offset, "the file shrank while it was read"))
            }
            Err(source) => Err(ModelError::Io {
                file: self.file.clone(),
                source,
            }),
        }
    }

    pub(super) fn bytes<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ModelError> {
        let mut out = [0; N];
        self.fill(&mut out, what)?;
        Ok(out)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, ModelError> {
        Ok(u32::from_le_bytes(self.bytes(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, ModelError> {
        Ok(u64::from_le_bytes(self.bytes(what)?))
    }

    /// A count of things that take at least `min_bytes` each, so that a vector of that many is
    /// bounded by the size of the file.
    pub(super) fn count(&mut self, min_bytes: u64, what: &str) -> Result<usize, ModelError> {
        let at = self.offset;
        let count = self.u64(what)?;
        let left = self.size - self.offset;
        match count.checked_mul(min_bytes) {
            Some(bytes) if bytes <= left => Ok(count as usize),
            _ => Err(self.error(
                at,
                format!("{what} {count} needs more than the {left} bytes that follow"),
            )),
        }
    }

    pub(super) fn string(&mut self, what: &str) -> Result<String, ModelError> {
        let at = self.offset;
        let len = self.count(1, what)?;
        let mut bytes = vec![0; len];
        self.fill(&mut bytes, what)?;
        String::from_utf8(bytes).map_err(|_| self.error(at, format!("{what} is not UTF-8")))
    }
}
