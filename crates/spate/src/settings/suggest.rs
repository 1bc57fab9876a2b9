//! "Did you mean …": the known name closest to a mistyped one.

/// The candidate nearest to `name`, if it is near enough to be a typing mistake.
pub(crate) fn nearest<'a>(
    name: &str,
    candidates: impl Iterator<Item = &'a str>,
) -> Option<&'a str> {
    let allowed = (name.chars().count() / 3).clamp(1, 3);
    candidates
        .map(|candidate| (distance(name, candidate), candidate))
        .filter(|&(distance, _)| distance <= allowed)
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, candidate)| candidate)
}

/// Insertions, deletions and substitutions that turn `a` into `b` (Levenshtein 1966), by the
/// two-row form of Wagner and Fischer's algorithm.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut row = vec![i + 1];
        for (j, &to) in b.iter().enumerate() {
            let substituted = above[j] + usize::from(from != to);
            row.push(substituted.min(above[j + 1] + 1).min(row[j] + 1));
        }
        above = row;
    }
    above[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("port", "port"), 0);
    }

    #[test]
    fn only_near_names_are_suggested() {
        let names = ["port", "host", "max_model_len", "max_num_seqs"];
        assert_eq!(
            nearest("prot", names.into_iter()),
            None,
            "half of a short name is wrong"
        );
        assert_eq!(nearest("ports", names.into_iter()), Some("port"));
        assert_eq!(
            nearest("max-model-len", names.into_iter()),
            Some("max_model_len")
        );
        assert_eq!(
            nearest("max_model_length", names.into_iter()),
            Some("max_model_len")
        );
        assert_eq!(nearest("temperature", names.into_iter()), None);
    }
}
