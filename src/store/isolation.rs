//! Which rows of a refused batch PostgreSQL refuses, and whose fault that is.
//!
//! SQLSTATE does not say: a trigger raises P0001 for one row, and a column that was made NOT NULL yesterday 23502 for every
//! row. What is known for certain is which rows pass. So a few rows of it are tried alone first, whichever. If one is
//! inserted, the table takes rows, and whatever row it refuses is refused for its own sake. If none is, the table is at fault,
//! and the batch fails.

use std::collections::HashSet;

use tokio::time::{Instant, timeout_at};

use super::{Entry, Fate, RECENT, Session, StoreError, Stored, Way, error::Remedy};

/// Rows that are tried alone before any others.
const PROBES: usize = 8;
/// So many rows refused, and none inserted, are the table's fault.
const ENOUGH: usize = 3;
/// Into so many parts a refused part is divided. More find many refused rows sooner, fewer a single one.
const PARTS: usize = 8;
/// Most messages that are remembered as refused for their own sake.
const REMEMBERED: usize = 10_000;

/// How far the isolation of a batch's rows has come.
struct Isolation<'a, 'b> {
    entries: &'a [Entry<'b>],
    fates: Vec<Option<Fate>>,
    inserted: u64,
    stopped_groups: HashSet<&'a str>,
    way: Way,
}

impl Session {
    /// Inserts what the table takes of a batch that was refused, as far as there is time.
    ///
    /// Earlier entries of a group go first, so that a refused row holds back the rest of its group and nothing else.
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

    /// Tries some entries together. Of more than one, `parts` are what to try next if they are refused. Returns whether there
    /// was time.
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
            // The statement may still be under way on it.
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
                    // Of so few, each is tried alone: a pair with a refused row takes three statements.
                    let size = if part.len() <= 2 * PARTS { 1 } else { part.len().div_ceil(PARTS) };
                    parts.extend(part.chunks(size).rev().map(<[usize]>::to_vec));
                }
            },
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    /// Fails if rows were refused and none inserted, but for those that are known to be refused for their own sake.
    fn check_table(&self, isolation: &Isolation<'_, '_>) -> Result<(), StoreError> {
        let fates = isolation.entries.iter().zip(&isolation.fates);
        let refused: Vec<_> = fates
            .filter(|(entry, _)| !self.refused.contains(&entry.key))
            .filter_map(|(_, fate)| if let Some(Fate::Refused(error)) = fate { Some(error) } else { None })
            .collect();
        let certain = refused.iter().find(|error| error.is_the_table_s());
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
                    || error.is_likely_the_row_s(&self.sql.names)
                    || wrote_recently) =>
            {
                Fate::Doubtful(error)
            }
            Some(fate) => fate,
        });
        Ok(Stored { inserted, fates: fates.collect() })
    }
}

/// Some entries of a batch, by chance, as bad rows may come in any pattern; where the queue keeps an order, only such as come first in
/// their group.
fn probes(entries: &[Entry<'_>]) -> Vec<usize> {
    let mut groups = HashSet::new();
    let firsts = entries.iter().enumerate().filter(|(_, entry)| entry.group.is_none_or(|group| groups.insert(group)));
    fastrand::choose_multiple(firsts.map(|(index, _)| index), PROBES)
}
