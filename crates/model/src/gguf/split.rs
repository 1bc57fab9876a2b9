//! Models in several GGUF files: `NAME-00001-of-00003.gguf` and so on. The first holds the metadata,
//! each holds some of the tensors and says which one it is.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::{Header, Metadata};
use crate::ModelError;

/// More files than any model has; also what five digits can say.
const MAX_FILES: u32 = 99_999;

/// The other files of the model whose first file has been read, in order, with their checked
/// headers. None for a model in one file.
pub(super) fn read_others(path: &Path, first: &Header) -> Result<Vec<Header>, ModelError> {
    let refuse = |file: &Path, problem: String| ModelError::Model {
        file: file.to_owned(),
        problem,
    };
    let Some((number, count)) = place(&first.metadata)? else {
        return Ok(Vec::new());
    };
    if number != 0 {
        return Err(refuse(
            path,
            format!("this is file {} of {count}; name the first", number + 1),
        ));
    }
    if count > MAX_FILES {
        return Err(refuse(
            path,
            format!("split.count {count} is over {MAX_FILES}"),
        ));
    }
    let prefix = prefix(path, count).ok_or_else(|| {
        refuse(
            path,
            format!(
                "the first of {count} files must be called NAME-00001-of-{count:05}.gguf, for the \
                 others to be found"
            ),
        )
    })?;
    let mut names: HashSet<String> = first.tensors.iter().map(|t| t.name.clone()).collect();
    let mut others = Vec::new();
    for i in 1..count {
        let path = file_name(&prefix, i, count);
        let mut header = Header::read(&path)?;
        if place(&header.metadata)? != Some((i, count)) {
            return Err(refuse(
                &path,
                format!("it does not say that it is file {} of {count}", i + 1),
            ));
        }
        for tensor in &mut header.tensors {
            if !names.insert(tensor.name.clone()) {
                let problem = format!("tensor `{}` is in another file, too", tensor.name);
                return Err(refuse(&path, problem));
            }
            tensor.file = i as usize;
        }
        others.push(header);
    }
    match first.metadata.get_u32("split.tensors.count")? {
        Some(expected) if expected as usize != names.len() => Err(refuse(
            path,
            format!(
                "split.tensors.count is {expected}, but the files hold {} tensors",
                names.len()
            ),
        )),
        _ => Ok(others),
    }
}

/// Which of how many files this is, counted from 0; `None` for a whole model.
fn place(metadata: &Metadata) -> Result<Option<(u32, u32)>, ModelError> {
    let count = metadata.get_u32("split.count")?.unwrap_or(1);
    let number = metadata.get_u32("split.no")?.unwrap_or(0);
    Ok((count > 1).then_some((number, count)))
}

/// The path up to the numbers, if it is that of the first of `count` files.
fn prefix(first: &Path, count: u32) -> Option<PathBuf> {
    let name = first.file_name()?.to_str()?;
    let stem = name.strip_suffix(&format!("-00001-of-{count:05}.gguf"))?;
    Some(first.with_file_name(stem))
}

fn file_name(prefix: &Path, index: u32, count: u32) -> PathBuf {
    let mut name = prefix.as_os_str().to_owned();
    name.push(format!("-{:05}-of-{count:05}.gguf", index + 1));
    name.into()
}
