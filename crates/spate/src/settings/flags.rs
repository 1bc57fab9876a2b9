//! The command-line flags, made from the table of settings.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Arg, ArgAction, ArgMatches, Command, FromArgMatches, value_parser};

use super::{Loaded, SETTINGS};

/// `[MODEL]`, `--config FILE` and one flag for each setting.
#[derive(Debug, Clone, Default)]
pub(crate) struct SettingFlags {
    model: Option<String>,
    config: Option<PathBuf>,
    given: Vec<(&'static str, String)>,
}

impl SettingFlags {
    /// Merges the flags with the environment and the configuration file.
    pub(crate) fn load(&self) -> Result<Loaded> {
        let mut flags = self.given.clone();
        if let Some(model) = &self.model {
            if flags
                .iter()
                .any(|(flag, value)| *flag == "model" && value != model)
            {
                bail!("two models were named: '{model}' and one with --model");
            }
            flags.push(("model", model.clone()));
        }
        // Names and values that are not Unicode can't be any of ours.
        let environment = std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        });
        Loaded::from_sources(self.config.as_deref(), environment, &flags)
    }
}

impl clap::Args for SettingFlags {
    fn augment_args(command: Command) -> Command {
        let model = Arg::new("positional-model")
            .value_name("MODEL")
            .help("The model, the same as --model");
        let config = Arg::new("config")
            .long("config")
            .value_name("FILE")
            .value_parser(value_parser!(PathBuf))
            .help("A TOML file of settings; flags and SPATE_… variables come before it");
        let settings = SETTINGS.iter().map(|setting| {
            let arg = Arg::new(setting.flag)
                .long(setting.flag)
                .value_name(setting.value)
                .help(setting.help)
                .help_heading("Settings");
            match setting.is_list {
                true => arg.action(ArgAction::Append),
                false => arg,
            }
        });
        command.arg(model).arg(config).args(settings)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for SettingFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = |flag: &'static str| {
            let values: Vec<&str> = matches
                .get_many::<String>(flag)?
                .map(String::as_str)
                .collect();
            Some((flag, values.join(",")))
        };
        Ok(Self {
            model: matches.get_one::<String>("positional-model").cloned(),
            config: matches.get_one::<PathBuf>("config").cloned(),
            given: SETTINGS
                .iter()
                .filter_map(|setting| given(setting.flag))
                .collect(),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
