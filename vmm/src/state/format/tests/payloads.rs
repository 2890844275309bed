//! Payloads: their form, and that new ones leave old states what they are.

use std::borrow::Cow;

use super::super::kinds::{KINDS, payloads};
use super::super::parts::{Kind, parts};
use super::super::payload::{MAX_PAYLOADS, Payload, read, write};
use super::super::wire::{exactly, wire};
use super::*;

/// A device that a later program has: a lamp.
const LAMP: Kind = Kind {
    name: "lamp",
    versions: &[|parts, _, bytes| {
        parts.lamp = Some(exactly(bytes, |_| Ok(()))?);
        Ok(())
    }],
};

/// What a later program knows, whose names come in whatever order.
fn later_kinds() -> Vec<Kind> {
    let mut kinds = vec![LAMP];
    kinds.extend(
        KINDS
            .iter()
            .copied()
            .flatten()
            .rev()
            .map(|kind| Kind { ..*kind }),
    );
    kinds
}

fn lamp(flags: u32, version: u32) -> Payload<'static> {
    Payload {
        flags,
        version,
        ..Payload::needed("lamp", 1, 0, wire(&7_u64))
    }
}

/// A state with this payload besides its own.
fn with(payload: Payload<'static>) -> Vec<u8> {
    let mut list = payloads(&small());
    list.push(payload);
    framed(VERSION, &write(&list))
}

fn what(bytes: &[u8]) -> &'static str {
    match reason(bytes) {
        StateError::Payloads { what } => what,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_new_device_orphans_no_old_state() {
    let bytes = small().encode();
    let (_, content) = verified(&bytes).unwrap();
    let read_again = kinds::decode(read(content).unwrap(), &[&later_kinds()]).unwrap();
    assert!(read_again.encode() == bytes);
    let old = parts(read(content).unwrap(), &[&later_kinds()]).unwrap();
    assert_eq!(old.lamp, None, "the device is not there");
    let new = with(lamp(1, 1));
    let (_, content) = verified(&new).unwrap();
    let new = parts(read(content).unwrap(), &[&later_kinds()]).unwrap();
    assert_eq!(new.lamp, Some(7));
    // Nor does one that is gone disturb those behind it.
    let mut list = payloads(&small());
    list.retain(|payload| payload.kind != "vm-generation");
    let without = MachineState::decode(&framed(VERSION, &write(&list))).unwrap();
    assert_eq!(without.vm_generation, None);
    assert_eq!(without.devices, small().devices);
}

#[test]
fn what_a_newer_program_needs_is_refused_by_name() {
    for version in [1, 9] {
        let refused = reason(&with(lamp(1, version)));
        let text = refused.to_string();
        assert!(
            matches!(&refused, StateError::NewerPayload { kind, version: told, supported: 0 }
                if kind == "lamp" && *told == version),
            "{text}"
        );
        assert!(
            text.contains("newer snapstore") && text.contains("\"lamp\""),
            "{text}"
        );
    }
    let mut list = payloads(&small());
    list[0].version = 2;
    let refused = reason(&framed(VERSION, &write(&list)));
    let text = refused.to_string();
    assert!(
        matches!(
            &refused,
            StateError::NewerPayload { kind, version: 2, supported: 1 } if kind == "clock"
        ),
        "{text}"
    );
    assert!(text.contains("reads versions up to 1"), "{text}");
    // Nobody knows what other flags ask for.
    for flags in [2, 3, 1 << 31] {
        assert!(matches!(
            reason(&with(lamp(flags, 1))),
            StateError::NewerPayload { .. }
        ));
    }
}

#[test]
fn what_need_not_be_understood_is_left_out() {
    let state = MachineState::decode(&with(lamp(0, 1))).unwrap();
    assert!(state.encode() == small().encode());
    let mut list = payloads(&small());
    list[0].flags = 0;
    let refused = what(&framed(VERSION, &write(&list)));
    assert!(refused.contains("need not be understood"), "{refused}");
}

#[test]
fn parts_that_every_machine_has_are_missed() {
    for missing in ["clock", "interrupts", "machine", "serial", "timer"] {
        let mut list = payloads(&small());
        list.retain(|payload| payload.kind != missing);
        let refused = reason(&framed(VERSION, &write(&list)));
        assert!(
            matches!(refused, StateError::LacksPayload { kind } if kind == missing),
            "{refused}"
        );
    }
    // The first of two vCPUs.
    let mut list = payloads(&golden());
    list.retain(|payload| (payload.kind, payload.number) != ("vcpu", 0));
    let refused = reason(&framed(VERSION, &write(&list)));
    assert!(matches!(refused, StateError::LacksPayload { kind: "vcpu" }));
    // The first of some devices, and two in one place.
    let mut list = payloads(&golden());
    list.retain(|payload| (payload.kind, payload.number) != ("virtio-block", 0));
    assert!(what(&framed(VERSION, &write(&list))).contains("one window each"));
    let mut list = payloads(&golden());
    for payload in &mut list {
        payload.number = payload.number.min(1);
    }
    list.retain(|payload| payload.kind != "vcpu");
    assert!(what(&framed(VERSION, &write(&list))).contains("one window each"));
    assert!(matches!(
        reason(&framed(VERSION, &[])),
        StateError::LacksPayload { .. }
    ));
}

#[test]
fn a_list_has_one_form() {
    let list = payloads(&small());
    let good = write(&list);
    assert_eq!(read(&good).unwrap().len(), list.len());
    let refused = |content: &[u8]| what(&framed(VERSION, content));
    // Two of them change places; one comes twice.
    let mut swapped = good.clone();
    let first = 32 + list[0].bytes.len();
    swapped.rotate_left(first);
    assert!(refused(&swapped).contains("order"));
    let twice = [&good[..first], &good[..]].concat();
    assert!(refused(&twice).contains("order"));
    for length in [1, 31, 32, good.len() - 1] {
        assert!(refused(&good[..length]).contains("ends early"), "{length}");
    }
    for (at, value) in [(0, b'C'), (0, 0), (1, 0), (15, b'x'), (2, 0xff)] {
        let mut odd = good.clone();
        odd[at] = value;
        assert!(refused(&odd).contains("is no name"), "{at} {value}");
    }
    let mut odd = good.clone();
    odd[16] = 0;
    assert!(refused(&odd).contains("version 0"));
    odd[16] = 1;
    odd[20] = 1;
    assert!(refused(&odd).contains("second payload"));
    let mut odd = good.clone();
    odd[28..32].fill(0xff);
    assert!(refused(&odd).contains("ends early"));
}

#[test]
fn a_payload_is_no_longer_and_no_shorter_than_its_value() {
    for change in [1, -1] {
        let mut list = payloads(&small());
        for at in 0..list.len() {
            let bytes = list[at].bytes.to_mut();
            if change > 0 {
                bytes.push(0);
            } else {
                bytes.pop();
            }
            let refused = reason(&framed(VERSION, &write(&list)));
            assert!(
                matches!(
                    refused,
                    StateError::TrailingBytes { extra: 1 } | StateError::Malformed { .. }
                ),
                "{}: {refused}",
                list[at].kind
            );
            list = payloads(&small());
        }
    }
    // The same number in another form.
    let mut list = payloads(&small());
    let machine = list
        .iter_mut()
        .find(|payload| payload.kind == "machine")
        .unwrap();
    assert_eq!(*machine.bytes, [0x80, 0x80, 0x80, 0x80, 0x02]);
    machine.bytes = Cow::Borrowed(&[0x80, 0x80, 0x80, 0x80, 0x82, 0x00]);
    assert!(matches!(
        reason(&framed(VERSION, &write(&list))),
        StateError::NotCanonical
    ));
}

#[test]
fn more_payloads_than_can_be_are_refused() {
    let mut list = payloads(&small());
    for number in 0..1000 {
        let mut one = lamp(0, 1);
        one.number = number;
        list.push(one);
    }
    assert!(what(&framed(VERSION, &write(&list))).contains("more payloads"));
    list.truncate(MAX_PAYLOADS);
    MachineState::decode(&framed(VERSION, &write(&list))).unwrap();
}
