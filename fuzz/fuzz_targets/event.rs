//! Any event is refused or read. From JSON, the scanner reads what serde_json reads.
#![no_main]

use libfuzzer_sys::fuzz_target;
use login_etl::event::{Message, parsed_messages, scanned_messages};

fn content<'a>(messages: &'a [Message<'_>]) -> impl Iterator<Item = impl PartialEq + std::fmt::Debug + use<'a>> {
    messages.iter().map(|message| {
        let texts = [message.id(), message.receipt_handle(), message.queue_arn(), message.fifo_group()];
        (texts, message.body(), message.sent_timestamp(), message.receive_count())
    })
}

fuzz_target!(|event: &str| {
    // Also as a message and as a body, which chance alone seldom finds.
    for event in
        [event.to_owned(), format!(r#"{{"Records": [{event}]}}"#), format!(r#"{{"Records": [{{"body": {event}}}]}}"#)]
    {
        if let (Some(scanned), Ok(parsed)) = (scanned_messages(&event), parsed_messages(event.as_bytes())) {
            assert!(content(&scanned).eq(content(&parsed)));
        }
    }
});
