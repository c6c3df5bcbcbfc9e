package boot

import "testing"

func TestAddedAlias(t *testing.T) {
	for _, tt := range []struct {
		name, event, alias string
		ok                 bool
	}{
		{
			name:  "added",
			event: "add@/devices/pci0000:00/0000:00:02.0/virtio3\x00ACTION=add\x00DEVPATH=/devices/x\x00SUBSYSTEM=virtio\x00MODALIAS=virtio:d00000001v00001AF4\x00SEQNUM=12\x00",
			alias: "virtio:d00000001v00001AF4", ok: true,
		},
		{name: "removed", event: "remove@/x\x00ACTION=remove\x00MODALIAS=virtio:d00000001v00001AF4\x00", alias: "virtio:d00000001v00001AF4"},
		{name: "no alias", event: "add@/x\x00ACTION=add\x00SUBSYSTEM=block\x00"},
		{name: "of another kind", event: "libudev\x00\xfe\xed\xca\xfe"},
		{name: "empty"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if alias, ok := addedAlias([]byte(tt.event)); alias != tt.alias || ok != tt.ok {
				t.Errorf("addedAlias = %q, %v, want %q, %v", alias, ok, tt.alias, tt.ok)
			}
		})
	}
}

func TestIsPowerButton(t *testing.T) {
	// As seen on q35: genetlink header, attribute header, class, bus id, type, data.
	event := "\x01\x01\x00\x00\x30\x00\x01\x00button/power\x00\x00\x00\x00\x00\x00\x00\x00LNXPWRBN:00\x00\x00\x00\x00\x80\x00\x00\x00\x01\x00\x00\x00"
	if !isPowerButton([]byte(event)) {
		t.Error("the power button is not seen")
	}
	for _, other := range []string{"", "\x01\x01\x00\x00button/lid\x00", "button/powerful\x00"} {
		if isPowerButton([]byte(other)) {
			t.Errorf("%q is taken for the power button", other)
		}
	}
}
