//! Simulators and oracles shared by the tests of this room.
