//! How a command fails: one line and an exit code.

use std::{error::Error, process::ExitCode};

use crate::{
    config::ConfigError,
    daemon::{
        control::client::ControlError,
        error::{StartError, chain},
        mountpoint::MountpointError,
    },
};

/// A command did not do what it was for.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    code: u8,
    /// Empty when everything was said already.
    message: String,
}

impl Failure {
    /// The command was right, but it did not work.
    pub fn failed(err: &dyn Error) -> Self {
        Self::because(1, chain(err))
    }

    /// The command itself is wrong.
    pub fn usage(why: impl Into<String>) -> Self {
        Self::because(2, why.into())
    }

    pub fn because(code: u8, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// The output said it; only the exit code is left to say.
    pub fn said(code: u8) -> Self {
        Self::because(code, "")
    }

    pub fn code(&self) -> u8 {
        self.code
    }

    pub fn message(&self) -> &str {
        &self.message
    }

    /// Prints the line.
    pub fn report(&self) -> ExitCode {
        if !self.message.is_empty() {
            eprintln!("casmount: {}", self.message);
        }
        ExitCode::from(self.code)
    }
}

impl From<StartError> for Failure {
    fn from(err: StartError) -> Self {
        Self::because(err.exit_code(), chain(&err))
    }
}

impl From<ConfigError> for Failure {
    fn from(err: ConfigError) -> Self {
        StartError::from(err).into()
    }
}

impl From<MountpointError> for Failure {
    fn from(err: MountpointError) -> Self {
        StartError::from(err).into()
    }
}

impl From<ControlError> for Failure {
    fn from(err: ControlError) -> Self {
        Self::failed(&err)
    }
}
