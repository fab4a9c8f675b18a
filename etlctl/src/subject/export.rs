//! All rows of a person, as JSON Lines in a new file.

use std::{io::Write, path::Path};

use login_etl::{keyring::Mask, mapping::Field};
use serde_json::{Map, Value, json};
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
    // Whatever could go wrong with it should do so before somebody's reason is on record.
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
        let mut rows: Vec<Map<String, Value>> =
            rows.iter().filter_map(|row| serde_json::from_str(row.get(0)).ok()).collect();
        let recovery = match reason {
            None => Recovery::default(),
            Some(reason) => {
                let keyring = settings.keyring().await?;
                let recover = |field: &Field, masked: &str| keyring.recover(&field.path, masked).ok();
                let recovery = Recovery::of(&mut rows, settings, recover);
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
                recovery
            }
        };
        let mut lines = Zeroizing::new(Vec::new());
        for row in &rows {
            serde_json::to_writer(&mut *lines, row).map_err(|_| failed("a row cannot be written as JSON"))?;
            lines.push(b'\n');
        }
        file.write_all(&lines)?;
        file.sync_all()?;
        Ok::<_, Failure>((rows.len(), recovery))
    };
    let (rows, recovery) = written.await.inspect_err(|_| {
        // Incomplete, and ours.
        drop(std::fs::remove_file(output));
    })?;
    let (recovered, lost) = (recovery.masks.len(), recovery.lost);
    let path = output.display().to_string();
    let mut text = format!("{} written to {}\n", count(rows as i128, "row"), printable(&path));
    if reason.is_some() {
        text += &format!("{} recovered, and that is recorded in etl_audit\n", count(recovered as i128, "value"));
    }
    if lost > 0 {
        text +=
            &format!("{WARNING}{} cannot be recovered with this keyring{WARNING:#}\n", count(lost as i128, "value"));
    }
    let json = json!({"rows": rows, "recovered": recovered, "lost": lost, "output": path});
    Ok(Reply { no: lost > 0, ..Reply::new(text, json) })
}

/// The masks whose values were added to the rows, and how many could not be recovered.
#[derive(Default)]
struct Recovery {
    masks: Vec<String>,
    lost: usize,
}

impl Recovery {
    /// Adds the values to the rows, under the fields' names.
    fn of(
        rows: &mut [Map<String, Value>],
        settings: &Settings,
        recover: impl Fn(&Field, &str) -> Option<Zeroizing<String>>,
    ) -> Self {
        let mut recovery = Self::default();
        for row in rows {
            for (column, field) in settings.mapping.masked().filter(|(_, field)| field.masked != Some(Mask::OneWay)) {
                let Some(masked) = row.get(&column.name).and_then(Value::as_str).map(ToOwned::to_owned) else {
                    continue;
                };
                let Some(value) = recover(field, &masked) else {
                    recovery.lost += 1;
                    continue;
                };
                // A column may have that name already.
                let name = match row.contains_key(&*field.path) {
                    false => field.path.to_string(),
                    true => format!("recovered_{}", field.path),
                };
                row.insert(name, json!(*value));
                recovery.masks.push(masked);
            }
        }
        recovery
    }
}
