package hypervisor

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestNICValidate(t *testing.T) {
	for _, n := range []NIC{
		{ID: "a", MAC: "02:00:00:00:00:01"},
		{ID: "a", MAC: "02:00:00:00:00:AB", MTU: 68},
		{ID: "a", MAC: "52:54:00:00:00:01", MTU: 65535},
	} {
		if err := n.Validate(); err != nil {
			t.Errorf("%+v: %v", n, err)
		}
	}
	for want, n := range map[string]NIC{
		"id is empty":                      {MAC: "02:00:00:00:00:01"},
		`"" is not the address`:            {ID: "a"},
		`"ff:ff:ff:ff:ff:ff" is not`:       {ID: "a", MAC: "ff:ff:ff:ff:ff:ff"},
		`"02:00:00:00:00:01:02:03" is not`: {ID: "a", MAC: "02:00:00:00:00:01:02:03"},
		`"0200.0000.0001" is not`:          {ID: "a", MAC: "0200.0000.0001"},
		"mtu 67 is not":                    {ID: "a", MAC: "02:00:00:00:00:01", MTU: 67},
		"mtu -1 is not":                    {ID: "a", MAC: "02:00:00:00:00:01", MTU: -1},
		"mtu 65536 is not":                 {ID: "a", MAC: "02:00:00:00:00:01", MTU: 65536},
	} {
		if err := n.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: error %v lacks %q", n, err, want)
		}
	}
}

// What is written down for a later process can be read again.
func TestPluggedJSON(t *testing.T) {
	was := Plugged{Kind: KindDisk, ID: "a", Slot: 7, Path: "/a.img"}
	text, err := json.Marshal(was)
	if want := `{"kind":"disk","id":"a","slot":7,"path":"/a.img"}`; err != nil || string(text) != want {
		t.Errorf("got %s, %v, want %s", text, err, want)
	}
	var is Plugged
	if err := json.Unmarshal(text, &is); err != nil || is != was {
		t.Errorf("got %+v, %v", is, err)
	}
}
