//! Exports all rows of a person to a new file, as JSON Lines.

use std::{collections::HashMap, io::Write, path::Path};

use login_etl::keyring::Keyring;
use serde_json::{json, value::RawValue};
use tokio_postgres::types::Type;
use zeroize::Zeroizing;

use crate::{
    audit,
    find::Person,
    output::{Failure, Reply, WARNING, count, failed, printable, spinner, sql},
    recover::create,
    settings::Settings,
};

pub async fn run(
    settings: &Settings,
    person: &Person<'_>,
    output: &Path,
    reason: Option<&str>,
) -> Result<Reply, Failure> {
    reason.map_or(Ok(()), audit::check_reason)?;
    let mapping = &settings.mapping;
    let mut connection = settings.database().await?;
    // Created first: if it cannot be, no recovery is recorded.
    let mut file = create(output)?;
    let written = async {
        let reading = spinner("Reading the person's rows");
        let query = format!(
            "select row_to_json(row)::text from (select * from {} where {}) row",
            mapping.table(),
            person.condition()
        );
        let rows = connection.client.query_typed(&query, &[(&person.values, Type::TEXT_ARRAY)]).await;
        let rows = rows.map_err(sql("read the person's rows"))?;
        drop(reading);
        let texts: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
        let mut recovery = Recovery::default();
        let mut lines = Zeroizing::new(String::new());
        if let Some(reason) = reason {
            let keyring = settings.keyring().await?;
            for text in &texts {
                lines.push_str(&recovery.extended(text, settings, &keyring)?);
                lines.push('\n');
            }
            let source = format!("export of {} by {}", settings.declared.table().plain(), person.column.name);
            let masks: Vec<_> = recovery.masks.iter().map(String::as_str).collect();
            let record = audit::Record {
                action: "export",
                reason,
                source: &source,
                requested: recovery.masks.len() + recovery.lost,
                recovered: masks.len(),
                masks: &masks,
            };
            audit::write(&mut connection.client, settings, &record).await?;
        } else {
            texts.iter().for_each(|text| lines.extend([*text, "\n"]));
        }
        file.write_all(lines.as_bytes())?;
        file.sync_all()?;
        Ok::<_, Failure>((texts.len(), recovery))
    };
    let (rows, recovery) = written.await.inspect_err(|_| {
        // It is incomplete, and this run created it.
        drop(std::fs::remove_file(output));
    })?;
    let (recovered, lost) = (recovery.masks.len(), recovery.lost);
    let path = output.display().to_string();
    let mut text = format!("{} written to {}\n", count(rows as i128, "row"), printable(&path));
    if reason.is_some() {
        text += &format!("{} recovered; recorded in etl_audit\n", count(recovered as i128, "value"));
    }
    if lost > 0 {
        text +=
            &format!("{WARNING}{} cannot be recovered with this keyring{WARNING:#}\n", count(lost as i128, "value"));
    }
    let json = json!({"rows": rows, "recovered": recovered, "lost": lost, "output": path});
    Ok(Reply { no: lost > 0, ..Reply::new(text, json) })
}

/// The masks whose values were added to the rows, and the number of masks that could not be recovered.
#[derive(Default)]
struct Recovery {
    masks: Vec<String>,
    lost: usize,
}

impl Recovery {
    /// The row's JSON as PostgreSQL wrote it, with the recovered values appended under their fields' names.
    fn extended(&mut self, row: &str, settings: &Settings, keyring: &Keyring) -> Result<Zeroizing<String>, Failure> {
        // Raw values, so that the other columns keep every digit.
        let columns: HashMap<String, &RawValue> =
            serde_json::from_str(row).map_err(|_| failed("a row cannot be read"))?;
        let mut text = Zeroizing::new(row.strip_suffix('}').unwrap_or(row).to_owned());
        for (column, field) in settings.mapping.recoverable() {
            let masked = columns.get(&column.name).and_then(|masked| serde_json::from_str::<String>(masked.get()).ok());
            let Some(masked) = masked else { continue };
            let Ok(value) = keyring.recover(&field.path, &masked) else {
                self.lost += 1;
                continue;
            };
            // A column may already have the field's name.
            let name = match columns.contains_key(&*field.path) {
                false => field.path.to_string(),
                true => format!("recovered_{}", field.path),
            };
            text.push_str(&format!(",{}:{}", json!(name), json!(*value)));
            self.masks.push(masked);
        }
        text.push('}');
        Ok(text)
    }
}
