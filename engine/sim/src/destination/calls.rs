//! The destination's calls into the VM, and the full verification.

use std::sync::Arc;
use std::time::Duration;

use pageferry::Error;
use pageferry::barrier::Barrier;
use pageferry::digest::{HashTable, PageHasher};
use pageferry::encode::Tally;
use pageferry::session::{DestinationAction, DestinationInput};
use pageferry::vm::VmResult;
use pageferry::wire::Offer;

use super::{DestinationHost, Heard, fresh_memory};
use crate::clock::Event;
use crate::fault::Call;
use crate::guest::lock;
use crate::receiver::{Overtakes, Room};
use crate::scenario::Canary;
use crate::source::state_of;
use crate::verify;
use crate::world::Context;

impl DestinationHost {
    pub(super) fn begin_call(&mut self, ctx: &mut Context, action: DestinationAction) {
        let lasts = Duration::from_nanos(self.random.below(self.vm.longest_call.as_nanos() as u64 + 1));
        self.work = Some(action);
        self.work_began = ctx.clock.now;
        ctx.clock.after(lasts, Event::Work(self.id));
    }

    pub(crate) fn on_work_done(&mut self, ctx: &mut Context) {
        let Some(action) = self.work.take() else { return };
        let took = ctx.clock.now.saturating_sub(self.work_began);
        let input = match action {
            DestinationAction::MakeRoom(offer) => match self.make_room(&offer) {
                Ok(exposed) => DestinationInput::RoomMade { exposed },
                Err(error) => DestinationInput::RoomRefused(error.to_string()),
            },
            DestinationAction::Load(state) => match self.load(&state) {
                Ok(()) => DestinationInput::Loaded { took },
                Err(source) => DestinationInput::Failed(Error::Vm { what: "load the machine state", source }),
            },
            DestinationAction::Start { run } => match self.commit(ctx, run) {
                Ok(()) => DestinationInput::Started { took },
                Err(source) => DestinationInput::Failed(Error::Vm { what: "start the guest", source }),
            },
            _ => return,
        };
        self.tell(ctx, input);
        self.go_on(ctx);
    }

    /// Whether the source may write into it.
    pub(super) fn make_room(&mut self, offer: &Offer) -> VmResult<bool> {
        let mut guest = lock(&self.guest);
        guest.attempt(Call::Prepare)?;
        if self.knows_nothing {
            return Err("this VMM is not ready for a guest".into());
        }
        let memory = Arc::new(fresh_memory(&offer.layout)?);
        guest.destination.memory = Some(Arc::clone(&memory));
        let exposed = self.one_sided && offer.data_lanes > 0;
        guest.exposed = exposed.then(|| Arc::clone(&memory));
        self.room = Some(Room {
            memory,
            hasher: PageHasher::new(&offer.digest_key),
            table: Arc::new(HashTable::new(offer.layout.page_space())),
            single_lane: offer.data_lanes == 0,
            barrier: Barrier::new(offer.data_lanes.max(1)),
            tally: Tally::default(),
            closed: false,
            exposed,
            progress: 0,
            overtakes: match self.canary {
                Some(Canary::BarrierOvertaken) => Overtakes::Everything,
                Some(Canary::CopiesOvertake) => Overtakes::Copies,
                _ => Overtakes::Nothing,
            },
            opened: false,
        });
        Ok(exposed)
    }

    pub(super) fn load(&mut self, state: &[u8]) -> VmResult<()> {
        let mut guest = lock(&self.guest);
        guest.attempt(Call::Load)?;
        let counter = state.first_chunk().copied().map(u64::from_le_bytes).ok_or("the machine state is too short")?;
        if state != state_of(counter, state.len() - 8) {
            return Err("the machine state is damaged".into());
        }
        guest.destination.loaded = Some(counter);
        Ok(())
    }

    pub(super) fn commit(&mut self, ctx: &mut Context, run: bool) -> VmResult<()> {
        let mut guest = lock(&self.guest);
        guest.attempt(Call::Commit)?;
        guest.commit_destination();
        guest.destination.runs = run;
        if run != guest.ran {
            guest.violate("the guest's running state changed at hand-over");
        }
        ctx.clock.after(Duration::ZERO, Event::Guest);
        Ok(())
    }

    pub(super) fn abort(&mut self) {
        if !self.knows_nothing {
            lock(&self.guest).abort_destination();
        }
    }

    pub(crate) fn on_verified(&mut self, ctx: &mut Context) {
        let Some(room) = &mut self.room else { return };
        let digest = verify::digest(&*room.memory, &room.hasher);
        room.progress += 1;
        self.shared.progress = room.progress;
        let took = ctx.clock.now.saturating_sub(self.verify_began);
        self.hear(ctx, Heard::Hashed(digest, took));
    }
}
