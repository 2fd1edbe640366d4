//! Where the ranks of a divided model meet: they add up what each has of a sum, in the order of
//! the ranks, so that the result is the same every time and for all of them.
//!
//! On the CPU the sum itself is made here. On GPUs (feature `nccl`) the ranks only make sure here
//! that all of them have come as far, and NCCL adds up on their streams: nothing is asked of a
//! device that another one will not answer, and none goes on, to what may wait for its device (an
//! allocation does), before all have asked. Whoever fails says so ([`Group::fail`]); those who wait
//! then leave with an error, and nobody waits for a rank that will not come.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

#[cfg(feature = "nccl")]
use hearth_kernels::cuda::{Communicators, Rows};

use crate::{Error, Result};

/// The ranks of one model.
#[derive(Debug)]
pub struct Group {
    size: usize,
    state: Mutex<State>,
    changed: Condvar,
    /// What `state` says of them, for those who look before they sleep.
    round: AtomicU64,
    failed: AtomicBool,
    #[cfg(feature = "nccl")]
    devices: Option<Communicators>,
}

#[derive(Debug, Default)]
struct State {
    /// Counts meetings that are over.
    round: u64,
    /// Ranks that are here already.
    arrived: usize,
    /// A rank will not come.
    failed: bool,
    /// What each rank brought.
    parts: Vec<Vec<f32>>,
    /// What the meeting before made of it.
    sum: Vec<f32>,
}

/// How often a rank looks before it sleeps: ranks that compute the same are seldom far apart.
const LOOKS: usize = 2000;

/// What ranks say that waited for one that failed.
const PARTED: &str = "another rank of the model has failed";

/// Whether an error is only the echo of another rank's.
pub(super) fn is_echo(error: &Error) -> bool {
    matches!(error, Error::Device(what) if what == PARTED)
}

impl Group {
    /// So many ranks in one memory.
    pub fn new(size: usize) -> Self {
        let state = State { parts: vec![Vec::new(); size], ..State::default() };
        Self {
            size,
            state: Mutex::new(state),
            changed: Condvar::new(),
            round: AtomicU64::new(0),
            failed: AtomicBool::new(false),
            #[cfg(feature = "nccl")]
            devices: None,
        }
    }

    /// One rank for each of these devices.
    #[cfg(feature = "nccl")]
    pub fn of_devices(devices: Communicators) -> Self {
        let ranks = Self::new(devices.len());
        Self { devices: Some(devices), ..ranks }
    }

    /// How many there are.
    pub fn size(&self) -> usize {
        self.size
    }

    /// One place for each of them.
    pub fn seats(self) -> Vec<Seat> {
        let group = Arc::new(self);
        (0..group.size).map(|rank| Seat { rank, group: Arc::clone(&group) }).collect()
    }

    /// A rank will not come: the others leave, from now on and wherever they wait.
    pub fn fail(&self) {
        self.lock().failed = true;
        self.failed.store(true, Ordering::Release);
        self.changed.notify_all();
        #[cfg(feature = "nccl")]
        if let Some(devices) = &self.devices {
            devices.abort();
        }
    }

    /// After a failure, when no rank is at work: they may meet again.
    ///
    /// # Errors
    /// Devices that do not find each other again.
    pub fn renew(&self) -> Result<()> {
        let mut state = self.lock();
        if !state.failed {
            return Ok(());
        }
        #[cfg(feature = "nccl")]
        if let Some(devices) = &self.devices {
            devices.renew()?;
        }
        (state.failed, state.arrived) = (false, 0);
        self.failed.store(false, Ordering::Release);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until every rank is here. `bring` is done on arrival; who comes last does `make`
    /// before anybody leaves, and all do `take` with what it made: nobody can make anything new
    /// before the last of them has taken it and come again.
    fn meet(
        &self,
        bring: impl FnOnce(&mut State),
        make: impl FnOnce(&mut State) -> Result<()>,
        take: impl FnOnce(&State),
    ) -> Result<()> {
        let parted = || Error::Device(PARTED.into());
        let mut state = self.lock();
        if state.failed {
            return Err(parted());
        }
        let round = state.round;
        bring(&mut state);
        state.arrived += 1;
        if state.arrived == self.size {
            make(&mut state)?;
            (state.arrived, state.round) = (0, round + 1);
            self.round.store(round + 1, Ordering::Release);
            self.changed.notify_all();
            take(&state);
            return Ok(());
        }
        drop(state);
        let waits = || {
            let here = self.round.load(Ordering::Acquire) == round;
            here && !self.failed.load(Ordering::Acquire)
        };
        for _ in 0..LOOKS {
            if !waits() {
                break;
            }
            std::hint::spin_loop();
        }
        let state = self.changed.wait_while(self.lock(), |s| s.round == round && !s.failed);
        let state = state.unwrap_or_else(PoisonError::into_inner);
        if state.round == round {
            return Err(parted());
        }
        take(&state);
        Ok(())
    }
}

/// One rank's place in its group.
#[derive(Clone, Debug)]
pub struct Seat {
    rank: usize,
    group: Arc<Group>,
}

impl Seat {
    /// Which rank, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Where it is.
    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// Makes `x` the sum of what all ranks have there.
    ///
    /// # Errors
    /// Another rank failed, or has other numbers to add up.
    pub fn sum(&self, x: &mut [f32]) -> Result<()> {
        let (len, part) = (x.len(), x.to_vec());
        self.group.meet(
            |state| state.parts[self.rank] = part,
            |state| {
                if state.parts.iter().any(|part| part.len() != len) {
                    return Err(Error::Batch("ranks have rows of different shapes".into()));
                }
                let State { parts, sum, .. } = state;
                sum.clone_from(&parts[0]);
                for part in &parts[1..] {
                    sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
                }
                Ok(())
            },
            |state| x.copy_from_slice(&state.sum),
        )
    }

    /// The same of rows on the devices of the ranks.
    ///
    /// # Errors
    /// As above, or what NCCL says.
    #[cfg(feature = "nccl")]
    pub fn sum_rows(&self, x: Rows) -> Result<Rows> {
        let devices = self.group.devices.as_ref();
        let devices = devices.ok_or_else(|| Error::Device("ranks without devices".into()))?;
        self.group.meet(|_| {}, |_| Ok(()), |_| {})?;
        let x = devices.sum(self.rank, x)?;
        self.group.meet(|_| {}, |_| Ok(()), |_| {})?;
        Ok(x)
    }
}
