-- Enters messages in the ledger, and fails if it has one of them. Takes the binary format.
copy user_logins_ledger (sent_at, message_id) from stdin (format binary)
