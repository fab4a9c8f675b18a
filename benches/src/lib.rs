//! What the contenders share: reading event files and reporting times.

use std::{
    error::Error,
    fs::{self, File, OpenOptions},
    io::{self, BufRead, Write},
    time::{Duration, Instant},
};

use bytes::{Buf, Bytes};
use rustix::time::{ClockId, clock_gettime};

pub mod sample;

/// Reads events, as the runtime delivers them, from a file. Each follows its length, a little-endian `u64`.
///
/// # Errors
/// When the file cannot be read, or ends within an event.
pub fn events(path: &str) -> Result<Vec<Bytes>, Box<dyn Error>> {
    let mut file = Bytes::from(fs::read(path)?);
    let mut events = Vec::new();
    while !file.is_empty() {
        let len = file.try_get_u64_le()? as usize;
        if file.len() < len {
            return Err("an event is cut short".into());
        }
        events.push(file.split_to(len));
    }
    Ok(events)
}

/// The pipe to which a contender reports its times; `BENCH_ANSWERS` names it.
#[derive(Debug)]
pub struct Answers(File);

/// What a contender did with a file.
#[derive(Debug, Default)]
pub struct Answer {
    /// How long each event took.
    pub times: Vec<Duration>,
    /// Total CPU time of the process.
    pub cpu: Duration,
    /// Batch item failures.
    pub failures: usize,
}

impl Answers {
    /// Opens the pipe and reports that the contender is ready.
    ///
    /// # Errors
    /// When `BENCH_ANSWERS` is not set, or its pipe cannot be opened.
    pub fn open() -> Result<Self, Box<dyn Error>> {
        let mut pipe = OpenOptions::new().write(true).open(std::env::var("BENCH_ANSWERS")?)?;
        pipe.write_all(b"ready\n")?;
        Ok(Self(pipe))
    }

    /// Reports the times of a file.
    ///
    /// # Errors
    /// When nobody reads them.
    pub fn tell(&mut self, answer: &Answer) -> io::Result<()> {
        let ns: Vec<_> = answer.times.iter().map(Duration::as_nanos).collect();
        let (cpu, failures) = (answer.cpu.as_nanos(), answer.failures);
        writeln!(self.0, r#"{{"ns": {ns:?}, "cpu_ns": {cpu}, "failures": {failures}}}"#)
    }
}

/// The paths of the event files, as they arrive on standard input.
pub fn files() -> impl Iterator<Item = io::Result<String>> {
    io::stdin().lock().lines()
}

/// CPU time of this process so far, user and system.
pub fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Runs `work`, and appends how long it took to `times`.
pub fn timed<T>(times: &mut Vec<Duration>, work: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let result = work();
    times.push(started.elapsed());
    result
}
