//! How fast a guest of incompressible memory is saved and restored, beside plain direct I/O of as many bytes on the same disk.
//!
//! `cargo run --release -p pageferry-file --example disk -- FOLDER [MIB [TURNS [LANES]]]`; a folder on the disk in question.
//! Turns alternate, and each turn's ratio is taken by itself: disks of virtual machines change their speed by the minute.

use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pageferry::dirty::{DirtySource, WriteLog};
use pageferry::memory::{Backing, GuestMemory, Layout, MappedMemory, Region, RegionId};
use pageferry::vm::VmResult;
use pageferry::{Control, Destination, DestinationConfig, DestinationVm, Source, SourceConfig, SourceVm};
use pageferry_file::{FileAcceptor, FileDialer, RestoreOptions, SaveOptions};
use rustix::fs::{FallocateFlags, OFlags, fallocate};

const REQUEST: usize = 4 << 20;
const THREADS: u64 = 4;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = PathBuf::from(arguments.next().ok_or("usage: disk FOLDER [MIB [TURNS [LANES]]]")?);
    let mut number = |default: u64| arguments.next().map_or(Ok(default), |text| text.parse::<u64>());
    let (mib, turns, lanes) = (number(1024)?, number(5)?, number(1)? as u16);
    let (path, plain) = (folder.join("disk-example.ferry"), folder.join("disk-example.plain"));
    let mut guest = Guest::filled(mib << 20)?;
    let result = compare(&mut guest, (&path, &plain), turns, lanes);
    let _ = (fs::remove_file(&path), fs::remove_file(&plain));
    result
}

fn compare(guest: &mut Guest, (path, plain): (&Path, &Path), turns: u64, lanes: u16) -> Result<(), Box<dyn Error>> {
    let mut ratios = (Vec::new(), Vec::new());
    for turn in 0..turns {
        // Freeing a file takes as long as a good part of writing one.
        let _ = fs::remove_file(path);
        let (written, save) = {
            let options = SaveOptions::default();
            let mut config = SourceConfig::default();
            config.lanes = lanes;
            let dialer = Arc::new(FileDialer::new(path, options)?);
            let begun = Instant::now();
            Source::new(config).run(guest, dialer, &Control::new())?;
            (fs::metadata(path)?.len(), begun.elapsed())
        };
        let plain_write = write_plainly(plain, written)?;
        let plain_read = read_plainly(plain, written)?;
        let restore = {
            let mut room = Room::touched(guest.memory.layout())?;
            let begun = Instant::now();
            let acceptor = Arc::new(FileAcceptor::open(path, RestoreOptions::default())?);
            Destination::new(DestinationConfig::default()).run(&mut room, acceptor, &Control::new())?;
            let took = begun.elapsed();
            room.compare(guest)?;
            took
        };
        let speed = |time: Duration| written as f64 / time.as_secs_f64() / 1e9;
        let ratio = (plain_write.as_secs_f64() / save.as_secs_f64(), plain_read.as_secs_f64() / restore.as_secs_f64());
        println!(
            "turn {turn}: {} MiB; save {:.3} GB/s, plain write {:.3}, ratio {:.3}; restore {:.3} GB/s, plain read {:.3}, ratio {:.3}",
            written >> 20,
            speed(save),
            speed(plain_write),
            ratio.0,
            speed(restore),
            speed(plain_read),
            ratio.1
        );
        ratios.0.push(ratio.0);
        ratios.1.push(ratio.1);
    }
    println!("median: save {:.3} of plain direct I/O, restore {:.3}", median(ratios.0), median(ratios.1));
    Ok(())
}

fn median(mut ratios: Vec<f64>) -> f64 {
    ratios.sort_by(f64::total_cmp);
    ratios[ratios.len() / 2]
}

fn open_directly(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).mode(0o600).custom_flags(OFlags::DIRECT.bits() as i32);
    options.open(path)
}

/// Every request once, by threads that take the next one.
fn in_requests(len: u64, work: impl Fn(&mut [u8], u64) -> io::Result<()> + Sync) -> io::Result<()> {
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let thread = || {
            let mut bytes = vec![0xA5; REQUEST + 4096];
            let start = bytes.as_ptr().align_offset(4096);
            loop {
                let offset = next.fetch_add(REQUEST as u64, Ordering::Relaxed);
                if offset >= len {
                    return Ok(());
                }
                let request = (len - offset).min(REQUEST as u64) as usize;
                work(&mut bytes[start..start + request], offset)?;
            }
        };
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(thread)).collect();
        threads.into_iter().map(|thread| thread.join().expect("it does not panic")).collect::<io::Result<()>>()
    })
}

fn write_plainly(path: &Path, len: u64) -> io::Result<Duration> {
    let _ = fs::remove_file(path);
    let begun = Instant::now();
    let file = open_directly(path)?;
    fallocate(&file, FallocateFlags::empty(), 0, len)?;
    in_requests(len, |bytes, offset| file.write_all_at(bytes, offset))?;
    file.sync_data()?;
    Ok(begun.elapsed())
}

fn read_plainly(path: &Path, len: u64) -> io::Result<Duration> {
    let begun = Instant::now();
    let file = open_directly(path)?;
    in_requests(len, |bytes, offset| file.read_exact_at(bytes, offset))?;
    Ok(begun.elapsed())
}

/// Memory that no codec makes smaller, and that nobody writes.
struct Guest {
    memory: Arc<MappedMemory>,
    log: WriteLog,
}

impl Guest {
    fn filled(len: u64) -> Result<Self, Box<dyn Error>> {
        let layout = Layout::new(vec![Region::ram("ram", 0, len)])?;
        let memory = Arc::new(MappedMemory::new(layout.clone(), Backing::Anonymous)?);
        let (mut state, mut chunk) = (0x9E37_79B9_7F4A_7C15_u64, vec![0; 1 << 20]);
        for offset in (0..len).step_by(chunk.len()) {
            for word in chunk.chunks_exact_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes());
            }
            let fits = chunk.len().min((len - offset) as usize);
            memory.write(RegionId(0), offset, &chunk[..fits])?;
        }
        Ok(Self { memory, log: WriteLog::new(layout) })
    }
}

impl SourceVm for Guest {
    fn memory(&self) -> Arc<dyn GuestMemory> {
        self.memory.clone()
    }
    fn dirty(&mut self) -> &mut dyn DirtySource {
        &mut self.log
    }
    fn describe(&mut self, _out: &mut dyn Write) -> VmResult<()> {
        Ok(())
    }
    fn pause(&mut self) -> VmResult<()> {
        Ok(())
    }
    fn resume(&mut self) -> VmResult<()> {
        Ok(())
    }
    fn save(&mut self, out: &mut dyn Write) -> VmResult<()> {
        Ok(out.write_all(&[0; 64])?)
    }
}

/// Memory that is there before the clock starts, as with `migrate restore --prefault`: plain reading has its buffers, too.
struct Room(Arc<MappedMemory>);

impl Room {
    fn touched(layout: &Layout) -> io::Result<Self> {
        let memory = MappedMemory::new(layout.clone(), Backing::Anonymous)?;
        memory.prefault()?;
        Ok(Self(Arc::new(memory)))
    }

    fn compare(&self, guest: &Guest) -> Result<(), Box<dyn Error>> {
        let memory = &self.0;
        let (mut ours, mut theirs) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        let len = memory.layout().regions()[0].len;
        for offset in (0..len).step_by(ours.len()) {
            memory.read(RegionId(0), offset, &mut ours)?;
            guest.memory.read(RegionId(0), offset, &mut theirs)?;
            if ours != theirs {
                return Err(format!("the memory differs within a MiB from {offset:#x}").into());
            }
        }
        Ok(())
    }
}

impl DestinationVm for Room {
    fn prepare(&mut self, _config: &[u8], _layout: &Layout) -> VmResult<Arc<dyn GuestMemory>> {
        Ok(self.0.clone())
    }
    fn load(&mut self, state: &mut dyn Read) -> VmResult<()> {
        Ok(io::copy(state, &mut io::sink()).map(|_| ())?)
    }
    fn commit(&mut self, _run: bool) -> VmResult<()> {
        Ok(())
    }
    fn abort(&mut self) {}
}
