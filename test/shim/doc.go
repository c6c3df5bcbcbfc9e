// Package shim drives the built shim as containerd does, without containerd:
// its commands, its task service over ttrpc, its events, with real machines. The
// tests say what containerd needs of any shim; what the implementation is like
// does not matter. VMSHIM_TEST_SHIM names another binary than the built one.
package shim
