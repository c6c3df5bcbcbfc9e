// Package kvm has the tests of what only a host with KVM has: that containers
// use it together with the kernel's vsock and control groups of version 2, and
// what happens where they may not. test/kvmhost makes such a host of any machine.
package kvm
