"""Shared set-up: the environment first, then fixtures that take seconds to make, and the long tests."""

import pytest

from core import environment  # noqa: F401  before anything imports TensorFlow

# Tests that repeat what another test shows, with more networks, schemes or faults, and tests that take most of a
# minute. `make test` leaves them out, `make test-long` runs them, CI does both. Beginnings of pytest's node ids.
LONG = """
test_activations.py::test_counts_of_backbones_equal_the_reference[0-resnet50
test_activations.py::test_counts_of_backbones_equal_the_reference[1-
test_any_model.py::test_own_model_resumes_after_sigkill_with_equal_bits
test_api.py::test_example_runs_where_tensorflow_came_first
test_applications.py::test_automatic_names_do_not_depend_on_the_process
test_applications.py::test_counts_equal_the_reference_and_selected_weights_move[convnexttiny
test_applications.py::test_counts_equal_the_reference_and_selected_weights_move[densenet121
test_applications.py::test_counts_equal_the_reference_and_selected_weights_move[efficientnetv2b0
test_applications.py::test_grouped_convolutions_have_no_memory_estimate
test_applications.py::test_legacy_file_gives_kerass_own_features[convnexttiny
test_applications.py::test_legacy_file_gives_kerass_own_features[densenet121
test_applications.py::test_legacy_file_gives_kerass_own_features[efficientnetb0
test_applications.py::test_legacy_file_gives_kerass_own_features[inceptionv3
test_applications.py::test_row_has_the_networks_candidates_and_size[convnextbase
test_applications.py::test_row_has_the_networks_candidates_and_size[convnextlarge
test_applications.py::test_row_has_the_networks_candidates_and_size[convnextsmall
test_applications.py::test_row_has_the_networks_candidates_and_size[convnextxlarge
test_applications.py::test_row_has_the_networks_candidates_and_size[densenet1
test_applications.py::test_row_has_the_networks_candidates_and_size[densenet201
test_applications.py::test_row_has_the_networks_candidates_and_size[efficientnetb1
test_applications.py::test_row_has_the_networks_candidates_and_size[efficientnetb2
test_applications.py::test_row_has_the_networks_candidates_and_size[efficientnetb3
test_applications.py::test_row_has_the_networks_candidates_and_size[efficientnetb4
test_applications.py::test_row_has_the_networks_candidates_and_size[efficientnetb5
test_applications.py::test_row_has_the_networks_candidates_and_size[efficientnetb6
test_applications.py::test_row_has_the_networks_candidates_and_size[efficientnetb7
test_applications.py::test_row_has_the_networks_candidates_and_size[efficientnetv2b1
test_applications.py::test_row_has_the_networks_candidates_and_size[efficientnetv2b2
test_applications.py::test_row_has_the_networks_candidates_and_size[efficientnetv2b3
test_applications.py::test_row_has_the_networks_candidates_and_size[efficientnetv2l
test_applications.py::test_row_has_the_networks_candidates_and_size[efficientnetv2m
test_applications.py::test_row_has_the_networks_candidates_and_size[efficientnetv2s
test_applications.py::test_row_has_the_networks_candidates_and_size[inceptionresnetv2
test_applications.py::test_row_has_the_networks_candidates_and_size[inceptionv3
test_applications.py::test_row_has_the_networks_candidates_and_size[nasnet
test_applications.py::test_row_has_the_networks_candidates_and_size[resnet101
test_applications.py::test_row_has_the_networks_candidates_and_size[resnet152
test_applications.py::test_row_names_the_files_of_keras[convnext
test_applications.py::test_row_names_the_files_of_keras[densenet
test_applications.py::test_row_names_the_files_of_keras[efficientnet
test_applications.py::test_row_names_the_files_of_keras[inceptionresnetv2
test_applications.py::test_row_names_the_files_of_keras[mobilenetv2
test_applications.py::test_row_names_the_files_of_keras[nasnet
test_applications.py::test_row_names_the_files_of_keras[resnet1
test_cache.py::test_as_many_views_as_epochs_equal_uncached_training
test_cache.py::test_auto_caches_if_the_result_stays_and_time_is_saved[flags1
test_cache.py::test_auto_caches_if_the_result_stays_and_time_is_saved[flags2
test_cache.py::test_auto_caches_if_the_result_stays_and_time_is_saved[flags3
test_cache.py::test_auto_caches_if_the_result_stays_and_time_is_saved[flags4
test_cache.py::test_cached_run_resumed_within_an_epoch_ends_the_same
test_cache.py::test_cut_inside_a_residual_block_keeps_each_branch[resnet50
test_cache.py::test_damaged_features_are_computed_again
test_cache.py::test_features_on_disk_are_reused_and_keyed
test_cache.py::test_frozen_to_the_head_only_the_pooled_features_are_cached
test_cache.py::test_full_disk_ends_the_run_and_leaves_no_features
test_cache.py::test_memory_budget_prices_what_the_run_estimates
test_cache.py::test_old_features_make_room_for_new_ones
test_cache.py::test_prefix_that_changes_ends_the_run
test_export.py::test_every_backbone_consists_of_known_operations[mobilenetv2
test_export.py::test_every_backbone_consists_of_known_operations[resnet50
test_main.py::test_photo_set_of_its_real_builder_trains[caltech_birds2011
test_main.py::test_photo_set_of_its_real_builder_trains[flowers102
test_main.py::test_photo_set_of_its_real_builder_trains[oxford_iiit_pet
test_main.py::test_warm_up_comes_before_the_intervals
test_main.py::test_warm_up_trains_the_head_before_the_selection
test_memory.py::test_api_measures_and_estimates_any_model
test_memory.py::test_api_works_after_tensorflow_was_imported
test_memory.py::test_budget_for_all_layers_has_no_next_layer
test_memory.py::test_command_line_prints_three_figures
test_memory.py::test_convention_gives_the_published_figures[vit
test_memory.py::test_longest_prefix_that_fits_trains
test_memory.py::test_measured_peak_follows_the_scheme_unless_weights_are_given
test_memory.py::test_measured_peak_is_within_the_budget
test_models.py::test_saved_networks_load_with_keras_alone
test_resume.py::test_early_stopping_ends_a_run_and_its_resumption
test_resume.py::test_full_disk_keeps_everything_written_before
test_resume.py::test_killed_processes_resume_to_the_same_result
test_resume.py::test_missing_data_file_is_named_and_run_resumes
test_resume.py::test_out_of_memory_names_batch_size_that_fits
test_resume.py::test_run_resumed_many_times_equals_uninterrupted_run[elastic_training
test_resume.py::test_run_resumed_many_times_equals_uninterrupted_run[fisher
test_resume.py::test_run_resumed_many_times_equals_uninterrupted_run[prunetrain
test_resume.py::test_run_without_checkpoint_restarts_in_its_folder
test_schemes.py::test_elastic_training_from_the_command_line
test_schemes.py::test_equal_reselection_changes_no_bit
test_schemes.py::test_exactly_the_promised_weights_move[elastic_training_grad_magnitude
test_schemes.py::test_exactly_the_promised_weights_move[elastic_training_weight_magnitude
test_schemes.py::test_fisher_equals_a_slow_reference[calibrated_mobilenet
test_schemes.py::test_fisher_equals_a_slow_reference[small_vit_network
test_schemes.py::test_momentum_does_not_revive_pruned_channels[adam
test_schemes.py::test_pruned_channels_give_zero_and_stay_pruned
test_schemes.py::test_rgn_equals_a_slow_reference[calibrated_mobilenet
test_schemes.py::test_schemes_run_from_the_command_line[prunetrain
test_schemes.py::test_schemes_run_from_the_command_line[rgn
test_schemes.py::test_schemes_run_from_the_command_line[spectrum
test_schemes.py::test_spectrum_equals_a_slow_reference[calibrated_mobilenet
test_schemes.py::test_strong_penalty_prunes_channels_that_stay_zero
test_strategy.py::test_keras_fit_fails_under_multi_worker_mirrored
test_strategy.py::test_two_devices_give_the_losses_of_one
test_weights.py::test_missing_weights_file_is_refused[.-another extension
test_weights.py::test_missing_weights_file_is_refused[weights.pth
""".strip().splitlines()
SLOW_FIXTURES = {"exported", "networks"}  # the whole backbones; an exported network


def pytest_collection_modifyitems(config, items):
    """Marks the tests of LONG `long`, and so `slow`. Where all tests are collected, every line must match one.

    Tests that share the networks of SLOW_FIXTURES are `slow`.
    """
    matched = set()
    for item in items:
        if SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
        name = item.nodeid.rpartition("/")[2]
        if beginnings := [line for line in LONG if name.startswith(line)]:
            matched.update(beginnings)
            item.add_marker("long")
            item.add_marker("slow")
    if config.args_source == pytest.Config.ArgsSource.TESTPATHS and (unknown := set(LONG) - matched):
        raise pytest.UsageError(f"LONG in tests/conftest.py must name tests. Received: {sorted(unknown)}.")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A TFDS folder that all tests share, so that digits are prepared once."""
    return str(tmp_path_factory.mktemp("tfds"))
