//! Which tests run over which kind of bucket.

#[cfg(feature = "cloud")]
use snapstore_tests::servers::{AZURE, S3, garage::GARAGE, radosgw::RADOSGW};

use super::{Made, Outcome, Scene};

/// Runs tests over one kind of bucket.
macro_rules! over_a_bucket {
    ($module:ident, $bodies:ident, $new:expr; $($name:ident)*) => {
        mod $module {
            use super::*;

            $(#[test] fn $name() -> Outcome {
                over(stringify!($name), $new, crate::tests::$bodies::$name)
            })*
        }
    };
}

/// Each of these runs over each kind of bucket in clear, and in an encrypted directory.
macro_rules! over_each_bucket {
    ($($name:ident)*) => {
        over_a_bucket! { in_a_directory, bodies, || Scene::new().map(Ok); $($name)* }
        over_a_bucket! { encrypted, bodies, || Scene::sealed().map(Ok); $($name)* }
        #[cfg(feature = "cloud")]
        over_a_bucket! { in_s3, bodies, || Scene::of(&S3); $($name)* }
        #[cfg(feature = "cloud")]
        over_a_bucket! { in_azure, bodies, || Scene::of(&AZURE); $($name)* }
        #[cfg(feature = "cloud")]
        over_a_bucket! { in_garage, bodies, || Scene::of(&GARAGE); $($name)* }
        #[cfg(feature = "cloud")]
        over_a_bucket! { in_radosgw, bodies, || Scene::of(&RADOSGW); $($name)* }
    };
}

over_each_bucket! {
    only_what_is_missing_moves
    what_no_tag_needs_goes_and_the_rest_stays
    a_tag_that_exists_is_not_moved_without_being_told
    what_was_removed_and_collected_is_pulled_again
    a_pull_brings_back_what_the_disk_has_lost
    hostile_objects_are_refused_and_named
    a_bucket_that_lost_all_records_is_not_emptied
    a_condemnation_that_is_damaged_is_named_with_the_way_out
    a_tag_whose_removal_was_cut_off_is_made_anew
    a_bucket_keeps_what_it_has_to
    a_write_whose_answer_is_lost_is_written_again
    a_part_behind_the_end_is_no_part
    long_objects_are_written_in_parts
    a_push_that_is_killed_at_any_request_is_run_again
    of_several_tags_all_are_looked_at_before_one_is_removed
    what_stays_there_reads_as_what_is_pulled
    a_push_that_replaces_mends_what_is_gone_or_damaged
    damage_of_others_stops_no_push
    a_configuration_that_is_lost_or_damaged_is_made_anew_for_the_same_pages
    a_working_set_goes_with_its_snapshot
    pages_of_others_are_found_by_hooks
    a_working_set_that_is_recorded_later_is_pushed_by_the_next_push
    what_is_partly_needed_is_repacked
    a_working_set_stays_one
}

/// Each of these runs over an encrypted bucket of each server: what depends on how long objects
/// are, and on which parts of them are read.
macro_rules! over_each_encrypted_server {
    ($($name:ident)*) => {
        #[cfg(feature = "cloud")]
        over_a_bucket! { encrypted_in_s3, bodies, || Scene::sealed_of(&S3); $($name)* }
        #[cfg(feature = "cloud")]
        over_a_bucket! { encrypted_in_azure, bodies, || Scene::sealed_of(&AZURE); $($name)* }
        #[cfg(feature = "cloud")]
        over_a_bucket! { encrypted_in_garage, bodies, || Scene::sealed_of(&GARAGE); $($name)* }
        #[cfg(feature = "cloud")]
        over_a_bucket! { encrypted_in_radosgw, bodies, || Scene::sealed_of(&RADOSGW); $($name)* }
    };
}

over_each_encrypted_server! {
    only_what_is_missing_moves
    what_no_tag_needs_goes_and_the_rest_stays
    hostile_objects_are_refused_and_named
    a_bucket_keeps_what_it_has_to
    a_part_behind_the_end_is_no_part
    long_objects_are_written_in_parts
    what_stays_there_reads_as_what_is_pulled
    a_configuration_that_is_lost_or_damaged_is_made_anew_for_the_same_pages
    a_working_set_goes_with_its_snapshot
    pages_of_others_are_found_by_hooks
    what_is_partly_needed_is_repacked
}

/// Each of these is of encrypted buckets.
macro_rules! over_each_encrypted_bucket {
    ($($name:ident)*) => {
        over_a_bucket! { sealed_in_a_directory, sealing, || Scene::sealed().map(Ok); $($name)* }
        #[cfg(feature = "cloud")]
        over_a_bucket! { sealed_in_s3, sealing, || Scene::sealed_of(&S3); $($name)* }
        #[cfg(feature = "cloud")]
        over_a_bucket! { sealed_in_azure, sealing, || Scene::sealed_of(&AZURE); $($name)* }
        #[cfg(feature = "cloud")]
        over_a_bucket! { sealed_in_garage, sealing, || Scene::sealed_of(&GARAGE); $($name)* }
        #[cfg(feature = "cloud")]
        over_a_bucket! { sealed_in_radosgw, sealing, || Scene::sealed_of(&RADOSGW); $($name)* }
    };
}

over_each_encrypted_bucket! {
    nothing_in_the_bucket_is_in_clear
    only_the_key_of_a_remote_opens_it
    what_is_done_to_an_encrypted_object_is_found
    a_name_of_another_key_is_a_finding_and_no_tag
    of_a_snapshot_that_stays_there_only_what_was_changed_is_refused
    a_condemnation_that_was_changed_is_told_with_the_way_out
    only_the_key_of_a_remote_mends_its_configuration
}

/// Runs a test in a new bucket, where there can be one.
pub fn over(name: &str, new: impl FnOnce() -> Made, body: fn(&Scene) -> Outcome) -> Outcome {
    match new()? {
        Ok(scene) => body(&scene),
        Err(why) => {
            println!("SKIPPED {name}: {why}");
            Ok(())
        }
    }
}
