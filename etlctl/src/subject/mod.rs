//! Finds, exports and erases a person's data.

mod erase;
mod export;

use crate::{
    cli,
    find::{self, Person},
    output::{Failure, Reply},
    settings::Settings,
};

pub async fn run(settings: &Settings, command: &cli::Subject) -> Result<Reply, Failure> {
    let (cli::Subject::Find { who, .. } | cli::Subject::Export { who, .. } | cli::Subject::Erase { who, .. }) = command;
    let person = Person::new(settings, who.field.as_deref(), &who.value).await?;
    match command {
        cli::Subject::Find { limit, .. } => find::rows(settings, &person, None, *limit).await,
        cli::Subject::Export { output, reason, .. } => export::run(settings, &person, output, reason.as_deref()).await,
        cli::Subject::Erase { reason, yes, batch, mentions, .. } => {
            let with_mentions = *mentions;
            let erasure = erase::Erasure { settings, person: &person, reason, batch: *batch, with_mentions };
            if *yes { erasure.erase().await } else { erasure.count().await }
        }
    }
}
