//! QEMU to QEMU, told what to do over QMP.
//!
//! Memory that nobody writes is that of a machine which never starts. A running guest is the same program that `migrate` boots;
//! it finds no port to rest on in QEMU's machine, so it looks at the clock all the time. Its virtual CPU therefore runs at a
//! lower priority than the migration, and its CPU time is not counted.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::qmp::Qmp;
use super::{Memory, Moved, Mover, Subject, Task};
use crate::network::Side;
use crate::process::{Program, Usage};
use crate::{BenchError, guest, host, sys};

const PROGRAM: &str = "qemu-system-x86_64";
const PORT: u16 = 7000;

/// What the names of all its settings start with.
pub(crate) const QEMU_PREFIX: &str = "qemu-";

/// Booting, filling memory, ending: each is a matter of seconds.
const PATIENCE: Duration = Duration::from_secs(120);

/// Names of threads that are virtual CPUs.
const VCPUS: &str = "CPU ";

/// What their niceness is: a tenth of the CPU time of others that want it.
const VCPU_NICENESS: i32 = 10;

/// No limit: bytes per second.
const MOST_BANDWIDTH: u64 = 1 << 40;

/// Milliseconds; the default of both programs.
const DOWNTIME_LIMIT: u64 = 300;

/// How QEMU sends pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Pages {
    Plain,
    Xbzrle,
    Multifd { channels: u8, zstd: Option<u8> },
}

/// A setting, as `plain`, `xbzrle`, `multifd-4`, `multifd-2-zstd`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct QemuSetting {
    pages: Pages,
    name: String,
}

impl FromStr for QemuSetting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split('-');
        let pages = match (words.next(), words.next(), words.next(), words.next()) {
            (Some("plain"), None, ..) => Some(Pages::Plain),
            (Some("xbzrle"), None, ..) => Some(Pages::Xbzrle),
            (Some("multifd"), Some(channels), codec, None) => multifd(channels, codec),
            _ => None,
        };
        let pages = pages
            .ok_or_else(|| format!("{text:?} is none of plain, xbzrle, multifd-CHANNELS, multifd-CHANNELS-zstd"))?;
        Ok(Self { pages, name: format!("{QEMU_PREFIX}{text}") })
    }
}

fn multifd(channels: &str, codec: Option<&str>) -> Option<Pages> {
    let channels = channels.parse().ok().filter(|channels| *channels > 0)?;
    match codec {
        None => Some(Pages::Multifd { channels, zstd: None }),
        Some("zstd") => Some(Pages::Multifd { channels, zstd: Some(1) }),
        Some(_) => None,
    }
}

impl QemuSetting {
    fn capabilities(&self) -> Value {
        let on = |name: &str, state: bool| json!({"capability": name, "state": state});
        let multifd = matches!(self.pages, Pages::Multifd { .. });
        json!([on("events", true), on("xbzrle", self.pages == Pages::Xbzrle), on("multifd", multifd)])
    }

    fn parameters(&self) -> Value {
        let mut parameters = json!({"max-bandwidth": MOST_BANDWIDTH, "downtime-limit": DOWNTIME_LIMIT});
        if let Pages::Multifd { channels, zstd } = self.pages {
            parameters["multifd-channels"] = channels.into();
            parameters["multifd-compression"] = if zstd.is_some() { "zstd" } else { "none" }.into();
            if let Some(level) = zstd {
                parameters["multifd-zstd-level"] = level.into();
            }
        }
        parameters
    }
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
    serial: PathBuf,
    start: Usage,
}

impl Qemu {
    pub(crate) fn new(migrate: PathBuf, setting: QemuSetting) -> Self {
        Self { setting, migrate }
    }

    fn start(&self, task: Task<'_>, side: Side) -> Result<Machine, BenchError> {
        let name = if side == Side::Source { "source" } else { "destination" };
        let (socket, serial) = (task.scratch.fresh(name), task.scratch.fresh(&format!("{name}.serial")));
        let mut command = task.network.command(side, Path::new(PROGRAM));
        command.args(["-name", "guest,debug-threads=on", "-nodefaults", "-display", "none"]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
        command.args(self.machine(task, side, &serial)?);
        if side == Side::Destination {
            command.args(["-incoming", "defer"]);
        }
        let mut program = Program::start("qemu", command)?;
        let mut qmp = Qmp::connect(&socket, || program.check())?;
        qmp.command("migrate-set-capabilities", &json!({"capabilities": self.setting.capabilities()}))?;
        qmp.command("migrate-set-parameters", &self.setting.parameters())?;
        Ok(Machine { program, qmp, serial, start: Usage::default() })
    }

    fn machine(&self, task: Task<'_>, side: Side, serial: &Path) -> Result<Vec<String>, BenchError> {
        let bytes = task.subject.bytes;
        let size = format!("{}K", bytes >> 10);
        let mut words: Vec<String> = vec!["-m".into(), size.clone()];
        if task.subject.memory.is_running() {
            let (program, line) = self.guest_program(task)?;
            words.extend(["-machine", "pc,accel=kvm", "-cpu", "qemu64", "-smp", "1", "-append"].map(str::to_owned));
            words.extend([line, "-kernel".into(), program.display().to_string()]);
            words.extend(["-serial".into(), format!("file:{}", serial.display())]);
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
        // What comes last counts; the processor that QEMU shows does not tell its clock frequency.
        Ok((path, format!("{} tsc_khz={}", line.trim(), sys::tsc_khz())))
    }

    fn export(&self, what: &str, path: &Path, subject: &Subject) -> Result<String, BenchError> {
        let mut command = Command::new(&self.migrate);
        command.args(["export", what]).arg(path).args(subject.arguments());
        Program::start("migrate export", command)?.output(PATIENCE)
    }
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
        &self.setting.name
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
        source.wait_ready(task.subject)?;
        drop(warmth);
        let mut destination = self.start(task, Side::Destination)?;
        let uri = json!({"uri": format!("tcp:{}:{PORT}", Side::Destination.address())});
        destination.qmp.command("migrate-incoming", &uri)?;
        for machine in [&mut source, &mut destination] {
            machine.stand_back()?;
        }
        let sent_before = task.network.sent_bytes(Side::Source)?;
        let started = Instant::now();
        source.qmp.command("migrate", &uri)?;
        let (ended, converged) = source.watch(started, task.limit)?;
        if converged {
            // Only then has everything left the source: its last megabytes still wait in its socket.
            destination.wait_arrived(task.subject)?;
        }
        let wire_bytes = task.network.sent_bytes(Side::Source)? - sent_before;
        let report = source.qmp.command("query-migrate", &Value::Null)?;
        Ok(Moved {
            seconds: (ended - started).as_secs_f64(),
            downtime_ms: report["downtime"].as_f64().filter(|_| converged),
            wire_bytes,
            source: source.usage(),
            destination: destination.usage(),
            rounds: report["ram"]["dirty-sync-count"].as_u64().unwrap_or(0),
            throttle_percent: report["cpu-throttle-percentage"].as_f64().unwrap_or(0.0),
            converged,
        })
    }
}

impl Machine {
    /// Waits until a running guest has filled its memory.
    fn wait_ready(&mut self, subject: &Subject) -> Result<(), BenchError> {
        if subject.memory.is_running() { self.wait_for_line("ready ") } else { Ok(()) }
    }

    /// Waits until the destination has everything, and a running guest shows that it lives.
    fn wait_arrived(&mut self, subject: &Subject) -> Result<(), BenchError> {
        match self.qmp.migration_state(&["completed", "failed"], PATIENCE)? {
            Some((_, state)) if state == "completed" => {}
            other => return Err(BenchError::Wrong(format!("QEMU's destination ended with {other:?}"))),
        }
        if subject.memory.is_running() { self.wait_for_line("hb ") } else { Ok(()) }
    }

    fn wait_for_line(&mut self, start: &str) -> Result<(), BenchError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            crate::interrupt::check()?;
            let printed = std::fs::read_to_string(&self.serial).unwrap_or_default();
            if printed.lines().any(|line| line.starts_with(start)) {
                return Ok(());
            }
            if printed.contains("panic ") || Instant::now() > deadline {
                return Err(BenchError::Tool(format!("the guest under QEMU does not say {start:?}: {printed}")));
            }
            std::thread::sleep(Duration::from_millis(20));
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

    /// Waits until the migration has ended, or cancels it at the limit; when, and whether it was completed.
    fn watch(&mut self, started: Instant, limit: Duration) -> Result<(Instant, bool), BenchError> {
        let ends = ["completed", "failed", "cancelled"];
        let mut end = self.qmp.migration_state(&ends, limit.saturating_sub(started.elapsed()))?;
        if end.is_none() {
            self.qmp.command("migrate_cancel", &Value::Null)?;
            end = self.qmp.migration_state(&ends, PATIENCE)?;
        }
        match end {
            Some((at, state)) if state == "completed" => Ok((at, true)),
            Some((at, state)) if state == "cancelled" => Ok((at, false)),
            other => {
                let report = self.qmp.command("query-migrate", &Value::Null)?;
                Err(BenchError::Wrong(format!("QEMU's migration ended with {other:?}: {report}")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_have_names_that_qemu_is_told_about() {
        let setting: QemuSetting = "multifd-2-zstd".parse().unwrap();
        assert_eq!(setting.name, "qemu-multifd-2-zstd");
        let parameters = setting.parameters();
        assert_eq!((&parameters["multifd-channels"], &parameters["multifd-compression"]), (&json!(2), &json!("zstd")));
        assert_eq!(parameters["multifd-zstd-level"], 1);
        let plain: QemuSetting = "plain".parse().unwrap();
        assert!(plain.parameters().get("multifd-channels").is_none());
        assert!(plain.capabilities().as_array().unwrap().contains(&json!({"capability": "multifd", "state": false})));
        for text in ["", "multifd", "multifd-0", "multifd-2-lz4", "multifd-2-zstd-9", "plain-2"] {
            assert!(text.parse::<QemuSetting>().is_err(), "{text}");
        }
    }
}
