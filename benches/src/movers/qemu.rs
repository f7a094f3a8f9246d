//! QEMU to QEMU, told what to do over QMP.
//!
//! Memory that nobody writes is that of a machine which never starts. A running guest is the same program that `migrate` boots,
//! and is asked the same questions; it finds no port to rest on in QEMU's machine, so it looks at the clock all the time.
//! Its virtual CPU therefore runs at a lower priority than the migration, and its CPU time is not counted.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::console::{Console, hidden};
use super::qmp::Qmp;
use super::setting::QemuSetting;
use super::{Memory, Moved, Mover, Subject, Task};
use crate::network::Side;
use crate::process::{Program, Usage};
use crate::study::{self, Proof, Remaining, Stalls};
use crate::{BenchError, guest, host, sys};

const PROGRAM: &str = "qemu-system-x86_64";

/// Booting, filling memory, ending: each is a matter of seconds.
const PATIENCE: Duration = Duration::from_secs(120);

/// Names of threads that are virtual CPUs.
const VCPUS: &str = "CPU ";

/// What their niceness is: a tenth of the CPU time of others that want it.
const VCPU_NICENESS: i32 = 10;

const PAGE: f64 = 4096.0;

/// Between two looks at how much is left.
const LOOK: Duration = Duration::from_millis(250);

/// A guest that has arrived runs so long before it is asked for its stalls there.
const AFTERWARDS: Duration = Duration::from_secs(1);

/// What the guest is told beyond what `migrate` tells it: firmware was there before it, and the processor that QEMU shows
/// does not tell its clock's frequency.
fn circumstances() -> String {
    format!("used-ram tsc_khz={}", sys::tsc_khz())
}

/// QEMU with a setting.
#[derive(Debug)]
pub(crate) struct Qemu {
    setting: QemuSetting,
    /// `migrate`, which writes the files that QEMU runs from.
    migrate: PathBuf,
}

/// One running QEMU.
struct Machine {
    program: Program,
    qmp: Qmp,
    /// Of a running guest.
    console: Option<Console>,
    start: Usage,
}

impl Qemu {
    pub(crate) fn new(migrate: PathBuf, setting: QemuSetting) -> Self {
        Self { setting, migrate }
    }

    fn start(&self, task: Task<'_>, side: Side) -> Result<Machine, BenchError> {
        let name = if side == Side::Source { "source" } else { "destination" };
        let socket = task.scratch.fresh(name);
        let running = task.subject.memory.is_running();
        let serial = || Console::listen(task.scratch.fresh(&format!("{name}.serial")));
        let console = if running { Some(serial()?) } else { None };
        let mut command = task.network.command(side, Path::new(PROGRAM));
        command.args(["-name", "guest,debug-threads=on", "-nodefaults", "-display", "none"]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
        command.args(self.machine(task, side, console.as_ref())?);
        if side == Side::Destination {
            command.args(["-incoming", "defer"]);
        }
        let mut program = Program::start(in_words(side), command)?;
        let mut qmp = Qmp::connect(in_words(side), &socket, || program.check())?;
        qmp.command("migrate-set-capabilities", &json!({"capabilities": self.setting.capabilities()}))?;
        qmp.command("migrate-set-parameters", &self.setting.parameters())?;
        Ok(Machine { program, qmp, console, start: Usage::default() })
    }

    fn machine(&self, task: Task<'_>, side: Side, console: Option<&Console>) -> Result<Vec<String>, BenchError> {
        let bytes = task.subject.bytes;
        let size = format!("{}K", bytes >> 10);
        let mut words: Vec<String> = vec!["-m".into(), size.clone()];
        if let Some(console) = console {
            let (program, line) = self.guest_program(task)?;
            words.extend(["-machine", "pc,accel=kvm", "-cpu", "qemu64", "-smp", "1", "-append"].map(str::to_owned));
            words.extend([line, "-kernel".into(), program.display().to_string()]);
            words.extend(["-chardev".into(), format!("socket,id=line,path={}", console.path().display())]);
            words.extend(["-serial", "chardev:line"].map(str::to_owned));
            return Ok(words);
        }
        let ram = match side {
            Side::Source => {
                let image = self.image(task)?;
                format!("memory-backend-file,id=ram,size={size},mem-path={},share=off,prealloc=on", image.display())
            }
            Side::Destination => format!("memory-backend-ram,id=ram,size={size}"),
        };
        words.extend(["-S", "-machine", "pc,accel=tcg,memory-backend=ram", "-object"].map(str::to_owned));
        words.push(ram);
        Ok(words)
    }

    /// The file that holds the memory.
    fn image(&self, task: Task<'_>) -> Result<PathBuf, BenchError> {
        let Subject { memory, bytes } = task.subject;
        if let Memory::Image(file) = memory {
            let held = std::fs::metadata(file).map_err(host("cannot read the image"))?.len();
            if held == *bytes {
                return Ok(file.clone());
            }
            return task.scratch.once(&format!("{memory}.padded"), |path| pad(file, path, *bytes));
        }
        task.scratch.once(&format!("{memory}-{bytes}.ram"), |path| self.export("memory", path, task.subject).map(drop))
    }

    /// The program for a running guest, and its command line.
    fn guest_program(&self, task: Task<'_>) -> Result<(PathBuf, String), BenchError> {
        let path = task.scratch.file("guest.elf");
        let line = self.export("program", &path, task.subject)?;
        // What comes last counts.
        Ok((path, format!("{} {}", line.trim(), circumstances())))
    }

    fn export(&self, what: &str, path: &Path, subject: &Subject) -> Result<String, BenchError> {
        let mut command = Command::new(&self.migrate);
        command.args(["export", what]).arg(path).args(subject.arguments());
        Program::start("migrate export", command)?.output(PATIENCE)
    }
}

fn in_words(side: Side) -> &'static str {
    if side == Side::Source { "QEMU at the source" } else { "QEMU at the destination" }
}

/// A copy that is as long as the guest's memory.
fn pad(from: &Path, to: &Path, bytes: u64) -> Result<(), BenchError> {
    let padded = || {
        std::fs::copy(from, to)?;
        std::fs::OpenOptions::new().write(true).open(to)?.set_len(bytes)
    };
    padded().map_err(host("cannot copy the image"))
}

impl Mover for Qemu {
    fn name(&self) -> &str {
        self.setting.name()
    }

    fn facts(&self) -> study::Mover {
        let mut command = Command::new(PROGRAM);
        command.arg("--version");
        let version = Program::start("qemu", command).and_then(|program| program.output(PATIENCE));
        let first = version.ok().and_then(|text| text.lines().next().map(str::to_owned));
        study::Mover {
            name: self.name().to_owned(),
            engine: study::Engine::Qemu,
            version: first.unwrap_or_else(|| "not known".to_owned()),
            settings: self.setting.words(),
        }
    }

    fn missing(&self, subjects: &[Subject]) -> Vec<String> {
        let mut missing = super::ours::missing_program(&self.migrate);
        if !Program::is_installed(PROGRAM) {
            missing.push(format!("`{PROGRAM}` (package qemu-system-x86)"));
        }
        if subjects.iter().any(|subject| subject.memory.is_running()) && !Path::new("/dev/kvm").exists() {
            missing.push("/dev/kvm, which QEMU needs to run a guest".to_owned());
        }
        missing
    }

    fn run(&self, task: Task<'_>) -> Result<Moved, BenchError> {
        let warmth = guest::prefaulted(task.subject.bytes)?;
        let mut source = self.start(task, Side::Source)?;
        let mut stalls = Stalls::default();
        if let Some(console) = &source.console {
            console.wait_ready(PATIENCE)?;
        }
        source.stand_back()?;
        if let Some(console) = &source.console {
            console.forget_stalls(PATIENCE)?;
        }
        drop(warmth);
        let mut destination = self.start(task, Side::Destination)?;
        let uri = |address| json!({"uri": format!("tcp:{address}")});
        destination.qmp.command("migrate-incoming", &uri(task.network.destination()))?;
        for machine in [&mut source, &mut destination] {
            machine.stand_back()?;
        }
        if let Some(console) = &source.console {
            stalls.before_ms = Some(ms(console.longest_stall(PATIENCE)?));
            console.forget_stalls(PATIENCE)?;
        }
        let working = source.console.as_ref().and_then(Console::last_beat);
        let sent_before = task.network.sent_bytes()?;
        let started = Instant::now();
        source.qmp.command("migrate", &uri(task.network.route()))?;
        let mut watched =
            source.watch(started, task.limit, self.setting.switches_to_postcopy(), &mut destination.program)?;
        watched.remaining.insert(0, Remaining { seconds: 0.0, bytes: task.subject.bytes, round: 0 });
        if watched.converged {
            // Only then has everything left the source: its last megabytes still wait in its socket when it is done.
            watched.ended = watched.ended.max(destination.wait_arrived()?);
        }
        let wire_bytes = task.network.sent_bytes()? - sent_before;
        // Where the guest is now: what post-copy has it wait for there is part of the migration.
        let last = |machine: &Machine| machine.console.as_ref().and_then(Console::last_beat);
        let worked = last(&destination).or_else(|| last(&source));
        let pages_per_second = working.zip(worked).and_then(|(before, after)| after.pages_per_second_since(before));
        let costs = (source.usage(), destination.usage());
        let report = source.qmp.command("query-migrate", &Value::Null)?;
        let mut verified = Vec::new();
        if let (true, Some(console)) = (watched.converged, &destination.console) {
            stalls.during_ms = Some(ms(stall_of_migration(&source, console)?));
            console.forget_stalls(PATIENCE)?;
            std::thread::sleep(AFTERWARDS);
            stalls.after_ms = Some(ms(console.longest_stall(PATIENCE)?));
            console.check(PATIENCE)?;
            verified.extend([Proof::Alive, Proof::GuestCheck]);
        }
        Ok(Moved {
            seconds: (watched.ended - started).as_secs_f64(),
            downtime_ms: report["downtime"].as_f64().filter(|_| watched.converged),
            stalls,
            remaining: watched.remaining,
            wire_bytes,
            source: costs.0,
            destination: costs.1,
            rounds: report["ram"]["dirty-sync-count"].as_u64().unwrap_or(0),
            throttle_percent: watched.throttle_percent,
            guest_bytes_per_second: pages_per_second.map(|pages| pages * PAGE),
            in_postcopy: source.qmp.saw_postcopy(),
            verified,
            stages: Vec::new(),
            converged: watched.converged,
        })
    }
}

/// The longest that the guest stood still since the migration began: by its own clock, or while that was stopped.
fn stall_of_migration(source: &Machine, destination: &Console) -> Result<Duration, BenchError> {
    let by_guest = destination.longest_stall(PATIENCE)?;
    let after = destination.first_beat(PATIENCE)?;
    let before = source.console.as_ref().and_then(Console::last_beat);
    Ok(by_guest.max(before.map_or(Duration::ZERO, |before| hidden(before, after, sys::tsc_khz()))))
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// How a migration went, seen from the source.
struct Watched {
    ended: Instant,
    converged: bool,
    remaining: Vec<Remaining>,
    throttle_percent: f64,
}

impl Machine {
    /// Waits until the destination has everything, and a running guest shows that it lives; since when it has.
    fn wait_arrived(&mut self) -> Result<Instant, BenchError> {
        let arrived = match self.qmp.migration_state(&["completed", "failed"], PATIENCE)? {
            Some((arrived, state)) if state == "completed" => arrived,
            Some((_, state)) => {
                return Err(BenchError::Tool(format!("QEMU at the destination says that it is {state}")));
            }
            None => {
                return Err(BenchError::Tool(format!(
                    "the guest had not arrived {PATIENCE:?} after its source was done"
                )));
            }
        };
        match &self.console {
            Some(console) => console.first_beat(PATIENCE).map(|_| arrived),
            None => Ok(arrived),
        }
    }

    /// Lets the virtual CPUs give way to the migration, and starts to count.
    fn stand_back(&mut self) -> Result<(), BenchError> {
        for thread in self.program.threads(VCPUS) {
            sys::be_nice(thread, VCPU_NICENESS).map_err(host("cannot lower the priority of a virtual CPU"))?;
        }
        self.qmp.forget_events();
        self.start = self.program.usage(VCPUS);
        Ok(())
    }

    fn usage(&self) -> Usage {
        let now = self.program.usage(VCPUS);
        Usage { cpu_seconds: now.cpu_seconds - self.start.cpu_seconds, ..now }
    }

    /// Waits until the migration has ended, or cancels it at the limit.
    fn watch(
        &mut self,
        started: Instant,
        limit: Duration,
        postcopy: bool,
        destination: &mut Program,
    ) -> Result<Watched, BenchError> {
        let (mut remaining, mut throttle_percent): (Vec<Remaining>, f64) = (Vec::new(), 0.0);
        let mut switched = !postcopy;
        let end = loop {
            let left = limit.saturating_sub(started.elapsed());
            let end = self.qmp.migration_state(&ENDS, left.min(LOOK));
            // How the program ended says more than that nobody answers.
            if let Some(end) = end.map_err(|error| self.program.check().err().unwrap_or(error))? {
                break end;
            }
            if left.is_zero() {
                break self.cancel()?;
            }
            destination.check()?;
            let report = self.qmp.command("query-migrate", &Value::Null)?;
            let (ram, throttle) = (&report["ram"], report["cpu-throttle-percentage"].as_f64());
            throttle_percent = throttle_percent.max(throttle.unwrap_or(0.0));
            if let (Some(bytes), Some(pass)) = (ram["remaining"].as_u64(), ram["dirty-sync-count"].as_u64()) {
                let round = pass.saturating_sub(1);
                remaining.push(Remaining { seconds: started.elapsed().as_secs_f64(), bytes, round });
                if round > 0 && !switched {
                    self.qmp.command("migrate-start-postcopy", &Value::Null)?;
                    switched = true;
                }
            }
        };
        match end {
            (ended, state) if state == "completed" => {
                Ok(Watched { ended, converged: true, remaining, throttle_percent })
            }
            (ended, state) if state == "cancelled" => {
                Ok(Watched { ended, converged: false, remaining, throttle_percent })
            }
            other => {
                let report = self.qmp.command("query-migrate", &Value::Null)?;
                Err(BenchError::Tool(format!("QEMU's migration ended with {other:?}: {report}")))
            }
        }
    }

    /// Gives up; one in post-copy can only go on.
    fn cancel(&mut self) -> Result<(Instant, String), BenchError> {
        self.qmp.command("migrate_cancel", &Value::Null)?;
        let end = self.qmp.migration_state(&ENDS, PATIENCE)?;
        end.ok_or_else(|| BenchError::Tool("QEMU neither ends its migration nor gives it up".to_owned()))
    }
}

/// States in which a migration is over.
const ENDS: [&str; 4] = ["completed", "failed", "cancelled", "postcopy-paused"];
