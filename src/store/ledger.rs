//! The ledger's key, which identifies the message of a row.

use std::time::{Duration, SystemTime};

use bytes::BufMut;
use uuid::{Uuid, uuid};

/// Namespace for message ids that are not UUIDs. SQS itself does not make such ids.
const NAMESPACE: Uuid = uuid!("5f2d2a3e-6a86-4d5f-9a35-0f0a1f6c6b1d");
/// 9999-12-31T23:59:59.999Z, well within what `timestamptz` holds.
const LATEST_MS: u64 = 253_402_300_799_999;
/// Microseconds from 1970 to PostgreSQL's epoch, 2000-01-01.
const MICROSECONDS_FROM_1970_TO_2000: i64 = 946_684_800_000_000;

/// Identifies a message through every redelivery.
///
/// The time comes first, so that new keys go to the end of the index, however large the ledger is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LedgerKey {
    /// When the message was sent, in whole milliseconds.
    pub sent_at: SystemTime,
    /// The message id.
    pub message_id: Uuid,
}

impl LedgerKey {
    /// The key of the message with this `messageId` and `SentTimestamp` (milliseconds since the epoch).
    ///
    /// An id that is not a UUID becomes one (version 5). A timestamp that is missing, unusable or before `horizon` becomes the
    /// epoch, whose keys are kept for ever. They are few, as SQS lets no message grow so old.
    pub fn new(message_id: &str, sent_timestamp: Option<u64>, horizon: SystemTime) -> Self {
        let sent_at = sent_timestamp
            .filter(|ms| *ms <= LATEST_MS)
            .map(|ms| SystemTime::UNIX_EPOCH + Duration::from_millis(ms))
            .filter(|sent_at| *sent_at >= horizon)
            .unwrap_or(SystemTime::UNIX_EPOCH);
        Self {
            sent_at,
            message_id: Uuid::try_parse(message_id).unwrap_or_else(|_| Uuid::new_v5(&NAMESPACE, message_id.as_bytes())),
        }
    }
}

impl LedgerKey {
    /// Appends the key as a row of the binary format for [`Sql::copy_ledger`](super::Sql).
    pub fn copy(&self, to: &mut impl BufMut) {
        let since_1970 = self.sent_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        to.put_i16(2);
        to.put_i32(8);
        to.put_i64(since_1970.as_micros() as i64 - MICROSECONDS_FROM_1970_TO_2000);
        to.put_i32(16);
        to.put_slice(self.message_id.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_id_and_timestamp_make_a_stable_key() {
        let horizon = SystemTime::UNIX_EPOCH + Duration::from_millis(1_545_000_000_000);
        let key = |id, timestamp| LedgerKey::new(id, timestamp, horizon);
        let usual = key("059f36b4-87a3-44ab-83d2-661975830a7d", Some(1_545_082_649_183));
        assert_eq!(usual.message_id, uuid!("059f36b4-87a3-44ab-83d2-661975830a7d"));
        assert_eq!(usual.sent_at, SystemTime::UNIX_EPOCH + Duration::from_millis(1_545_082_649_183));

        let odd = key("not a uuid", None);
        assert_eq!(odd.message_id, uuid!("7e9f5710-c605-5ed5-ba4b-594320e8c1ec"));
        assert_eq!(odd.sent_at, SystemTime::UNIX_EPOCH);
        for timestamp in [0, 1_544_999_999_999, u64::MAX] {
            assert_eq!(key("not a uuid", Some(timestamp)), odd, "{timestamp}");
        }
    }
}
