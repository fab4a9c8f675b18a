//! The contenders' common part: event files in, times out.

use std::{
    error::Error,
    fs::{self, File, OpenOptions},
    io::{self, BufRead, Write},
    time::{Duration, Instant},
};

use bytes::{Buf, Bytes};
use rustix::time::{ClockId, clock_gettime};

pub mod sample;

/// Events as the runtime delivers them, from a file: each behind its length, a little-endian `u64`.
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

/// Whom a contender tells its times: the pipe that `BENCH_ANSWERS` names.
#[derive(Debug)]
pub struct Answers(File);

/// What a contender did with a file.
#[derive(Debug, Default)]
pub struct Answer {
    /// How long each event took.
    pub times: Vec<Duration>,
    /// CPU time of the process, all in all.
    pub cpu: Duration,
    /// Batch item failures.
    pub failures: usize,
}

impl Answers {
    /// Opens the pipe and says that the contender is ready.
    ///
    /// # Errors
    /// When there is none.
    pub fn open() -> Result<Self, Box<dyn Error>> {
        let mut pipe = OpenOptions::new().write(true).open(std::env::var("BENCH_ANSWERS")?)?;
        pipe.write_all(b"ready\n")?;
        Ok(Self(pipe))
    }

    /// Tells the times of a file.
    ///
    /// # Errors
    /// When nobody reads them.
    pub fn tell(&mut self, answer: &Answer) -> io::Result<()> {
        let ns: Vec<_> = answer.times.iter().map(Duration::as_nanos).collect();
        let (cpu, failures) = (answer.cpu.as_nanos(), answer.failures);
        writeln!(self.0, r#"{{"ns": {ns:?}, "cpu_ns": {cpu}, "failures": {failures}}}"#)
    }
}

/// The paths of the files to work on, as they come.
pub fn files() -> impl Iterator<Item = io::Result<String>> {
    io::stdin().lock().lines()
}

/// CPU time of this process so far, its own and the kernel's for it.
pub fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Measures what `work` takes.
pub fn timed<T>(times: &mut Vec<Duration>, work: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let result = work();
    times.push(started.elapsed());
    result
}
