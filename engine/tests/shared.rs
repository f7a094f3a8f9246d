//! Memory that is the same on both sides is not copied, and only who can take it so is offered it.
#![allow(missing_docs)]

use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;

use pageferry::dirty::{DirtySource, WriteLog};
use pageferry::memory::{Backing, GuestMemory, Layout, MappedMemory, Region, RegionId, Transfer};
use pageferry::transport::in_memory;
use pageferry::vm::VmResult;
use pageferry::{
    Control, Destination, DestinationConfig, DestinationVm, Error, Failed, Report, Source, SourceConfig, SourceVm,
};

const LEN: u64 = 8 << 20;

struct Guest {
    memory: Arc<MappedMemory>,
    log: WriteLog,
    running: bool,
}

impl Guest {
    fn new() -> Self {
        let mut region = Region::ram("ram", 0, LEN);
        region.transfer = Transfer::Shared;
        let layout = Layout::new(vec![region]).unwrap();
        let memory = Arc::new(MappedMemory::new(layout.clone(), Backing::Memfd).unwrap());
        memory.write(RegionId(0), LEN - 7, b"content").unwrap();
        Self { memory, log: WriteLog::new(layout), running: true }
    }

    /// A descriptor of its own, as another process has it.
    fn file(&self) -> File {
        self.memory.file(RegionId(0)).unwrap().try_clone_to_owned().unwrap().into()
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
        self.running = false;
        Ok(())
    }
    fn resume(&mut self) -> VmResult<()> {
        self.running = true;
        Ok(())
    }
    fn save(&mut self, out: &mut dyn Write) -> VmResult<()> {
        Ok(out.write_all(b"state")?)
    }
}

struct Room {
    file: Option<File>,
    takes: bool,
    memory: Option<Arc<MappedMemory>>,
    asked: bool,
}

impl DestinationVm for Room {
    fn prepare(&mut self, _config: &[u8], layout: &Layout) -> VmResult<Arc<dyn GuestMemory>> {
        self.asked = true;
        let files = self.file.take().into_iter().collect();
        let memory = Arc::new(MappedMemory::from_files(layout.clone(), files)?);
        Ok(self.memory.insert(memory).clone())
    }
    fn load(&mut self, state: &mut dyn Read) -> VmResult<()> {
        Ok(std::io::copy(state, &mut std::io::sink()).map(|_| ())?)
    }
    fn commit(&mut self, _run: bool) -> VmResult<()> {
        Ok(())
    }
    fn abort(&mut self) {
        self.memory = None;
    }
    fn takes_shared_memory(&self) -> bool {
        self.takes
    }
}

fn migrate(guest: &mut Guest, takes: bool, lanes: u16) -> (Result<Report, Failed>, Room) {
    let (dialer, acceptor) = in_memory();
    let mut room = Room { file: Some(guest.file()), takes, memory: None, asked: false };
    let destination = std::thread::spawn(move || {
        let result = Destination::new(DestinationConfig::default()).run(&mut room, Arc::new(acceptor), &Control::new());
        (result, room)
    });
    let mut config = SourceConfig::default();
    config.lanes = lanes;
    let sent = Source::new(config).run(guest, Arc::new(dialer), &Control::new());
    let (arrived, room) = destination.join().unwrap();
    assert_eq!(sent.is_ok(), arrived.is_ok(), "{sent:?} {arrived:?}");
    (sent, room)
}

#[test]
fn shared_memory_is_handed_over_and_nothing_of_it_travels() {
    for lanes in [0, 2] {
        let mut guest = Guest::new();
        let (sent, room) = migrate(&mut guest, true, lanes);
        let report = sent.unwrap();
        assert!(report.wire_bytes < 4096 && report.pages_sent == 0, "{report:?}");
        guest.memory.write(RegionId(0), 0, b"the same").unwrap();
        let mut bytes = [0; 8];
        room.memory.unwrap().read(RegionId(0), 0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"the same");
    }
}

#[test]
fn a_destination_that_cannot_take_shared_memory_is_not_even_asked() {
    let mut guest = Guest::new();
    let (sent, room) = migrate(&mut guest, false, 1);
    let failed = sent.unwrap_err();
    assert!(matches!(&failed, Failed::SourceStillOwns { error: Error::Refused { .. }, .. }), "{failed:?}");
    assert!(failed.to_string().contains("hands its memory over"), "{failed}");
    assert!(!room.asked && guest.running);
}
