//! Finds out which rows of a refused batch PostgreSQL refuses, and whether the row or the table is at fault.
//!
//! The SQLSTATE does not tell: a trigger may raise P0001 for one row only, and a column made NOT NULL yesterday raises 23502 for
//! every row. So a few random rows are tried alone first. If one is inserted, the table takes rows, and every refused row is
//! itself at fault. If none is inserted and enough are refused, or one for a certain reason such as a missing column, the table is at
//! fault, and the batch fails. With fewer refused rows the fault stays in doubt, unless a row was written lately.

use std::collections::HashSet;

use tokio::time::{Instant, timeout_at};

use super::{Entry, Fate, RECENT, Session, StoreError, Stored, Way, database_error::Remedy};

/// Maximum rows that are tried alone first.
const PROBES: usize = 8;
/// The table is at fault if this many rows are refused and none is inserted.
const ENOUGH: usize = 3;
/// A refused part is divided into this many parts. More find many refused rows sooner; fewer find a single one sooner.
const PARTS: usize = 8;
/// Maximum messages that are remembered as refused by the row's own fault.
const REMEMBERED: usize = 10_000;

/// The progress of isolating a batch's refused rows.
struct Isolation<'a, 'b> {
    entries: &'a [Entry<'b>],
    fates: Vec<Option<Fate>>,
    inserted: u64,
    stopped_groups: HashSet<&'a str>,
    way: Way,
}

impl Session {
    /// Inserts the rows of a refused batch that the table takes, as far as there is time.
    ///
    /// Earlier entries of a group go first, so that a refused row holds back only the rest of its group.
    pub(super) async fn isolate(
        &mut self,
        entries: &[Entry<'_>],
        way: Way,
        deadline: Instant,
    ) -> Result<Stored, StoreError> {
        let fates = vec![None; entries.len()];
        let mut isolation = Isolation { entries, fates, inserted: 0, stopped_groups: HashSet::new(), way };
        for probe in probes(entries) {
            if isolation.inserted > 0 || !self.attempt(&mut isolation, vec![probe], &mut Vec::new(), deadline).await? {
                break;
            }
        }
        self.check_table(&isolation)?;
        let mut parts = vec![(0..entries.len()).collect::<Vec<_>>()];
        while let Some(part) = parts.pop() {
            if !self.attempt(&mut isolation, part, &mut parts, deadline).await? {
                break;
            }
        }
        self.check_table(&isolation)?;
        self.judge(isolation)
    }

    /// Tries some entries together. If several are refused, adds smaller parts to `parts` to try next. Returns whether there was
    /// time.
    async fn attempt<'a>(
        &mut self,
        isolation: &mut Isolation<'a, '_>,
        mut part: Vec<usize>,
        parts: &mut Vec<Vec<usize>>,
        deadline: Instant,
    ) -> Result<bool, StoreError> {
        let Isolation { entries, fates, stopped_groups, .. } = isolation;
        part.retain(|&index| {
            let is_held_back = entries[index].group.is_some_and(|group| stopped_groups.contains(group));
            if is_held_back && fates[index].is_none() {
                fates[index] = Some(Fate::HeldBack);
            }
            fates[index].is_none()
        });
        if part.is_empty() {
            return Ok(true);
        }
        let writing = self.write(part.iter().map(|&index| &entries[index]).collect(), isolation.way);
        let Ok((way, written)) = timeout_at(deadline, writing).await else {
            // The statement may still be running on it.
            self.connection = None;
            return Ok(false);
        };
        isolation.way = way;
        match written {
            Ok(count) => {
                isolation.inserted += count;
                part.iter().for_each(|&index| fates[index] = Some(Fate::Stored));
            }
            Err(StoreError::Insert(error)) if error.remedy() == Remedy::Isolate => match part[..] {
                [index] => {
                    fates[index] = Some(Fate::Refused(error));
                    stopped_groups.extend(entries[index].group);
                }
                _ => {
                    // So few rows are tried one by one: a pair with a refused row would take three statements.
                    let size = if part.len() <= 2 * PARTS { 1 } else { part.len().div_ceil(PARTS) };
                    parts.extend(part.chunks(size).rev().map(<[usize]>::to_vec));
                }
            },
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    /// Fails if the table is at fault: rows were refused and none inserted. Rows already known to be at fault do not count.
    fn check_table(&self, isolation: &Isolation<'_, '_>) -> Result<(), StoreError> {
        let fates = isolation.entries.iter().zip(&isolation.fates);
        let refused: Vec<_> = fates
            .filter(|(entry, _)| !self.refused.contains(&entry.key))
            .filter_map(|(_, fate)| if let Some(Fate::Refused(error)) = fate { Some(error) } else { None })
            .collect();
        let certain = refused.iter().find(|error| error.is_table_fault());
        match certain.or(refused.first()) {
            Some(error) if isolation.inserted == 0 && (certain.is_some() || refused.len() >= ENOUGH) => {
                Err(StoreError::Table((*error).clone()))
            }
            _ => Ok(()),
        }
    }

    fn judge(&mut self, isolation: Isolation<'_, '_>) -> Result<Stored, StoreError> {
        let Isolation { entries, fates, inserted, .. } = isolation;
        if fates.iter().all(Option::is_none) {
            return Err(StoreError::Deadline);
        }
        let wrote_recently = self.wrote_at.is_some_and(|at| at.elapsed().is_ok_and(|elapsed| elapsed < RECENT));
        let fates = entries.iter().zip(fates).map(|(entry, fate)| match fate {
            None => Fate::Untried,
            Some(Fate::Refused(error)) if inserted > 0 => {
                if self.refused.len() == REMEMBERED {
                    self.refused.clear();
                }
                self.refused.insert(entry.key);
                Fate::Refused(error)
            }
            Some(Fate::Refused(error))
                if !(self.refused.contains(&entry.key)
                    || error.is_likely_row_fault(&self.sql.names)
                    || wrote_recently) =>
            {
                Fate::Doubtful(error)
            }
            Some(fate) => fate,
        });
        Ok(Stored { inserted, fates: fates.collect() })
    }
}

/// Random entries of a batch, as bad rows may come in any pattern. Of a FIFO queue, only the first entries of groups.
fn probes(entries: &[Entry<'_>]) -> Vec<usize> {
    let mut groups = HashSet::new();
    let firsts = entries.iter().enumerate().filter(|(_, entry)| entry.group.is_none_or(|group| groups.insert(group)));
    fastrand::choose_multiple(firsts.map(|(index, _)| index), PROBES)
}
